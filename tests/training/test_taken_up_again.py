"""A run folder after something went wrong in it: refused late, started twice, damaged, not finite, split otherwise."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fewstep.distill.cli import main
from fewstep.distill.data.cache import LatentCache
from fewstep.distill.training.run_lock import locked
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file, save_file

from ..runs import lasting

WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"
Refused = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "lcd.yaml"
    tree = {
        "output_dir": "unset",
        "teacher": {"path": str(tiny_pipeline)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 4,
        "max_train_steps": 4,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "adam_epsilon": 1e-3,
        "use_ema": True,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copy it before anything is changed in it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["distill", str(config), "--output_dir", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def call(config: Path, tmp_path: Path) -> Callable[..., int]:
    """`fewstep distill CONFIG --output_dir tmp/run *arguments`."""
    return lambda *arguments: main(["distill", str(config), "--output_dir", f"{tmp_path}/run", *arguments])


@pytest.fixture
def refused(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which the command ends."""

    def line(*arguments: str) -> str:
        capsys.readouterr()
        assert call(*arguments) == 2
        written = capsys.readouterr().err
        lines = [x for x in written.splitlines() if x.startswith("fewstep: error: ")]
        assert len(lines) == 1 and written.endswith(lines[0] + "\n"), written
        return lines[0].removeprefix("fewstep: error: ")

    return line


def same_weights(run: Path, other: Path) -> bool:
    one, two = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [lasting(row) for row in rows]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--data.random_flip"],
        ["--enable_xformers_memory_efficient_attention"],
        ["--cpu_offload", "--teacher", "null", "--resolution", "16"],
        ["--resume_from_checkpoint", "{other}"],
    ],
)
def test_what_is_refused_late_leaves_nothing(
    wrong: list[str], refused: Refused, finished: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The last: a checkpoint of this network under a LoRA."""
    other = [w.format(other=finished / "checkpoint-4") for w in wrong]
    more = ["--student.kind", "lora"] if "{other}" in wrong[-1] else []
    refused(*other, *more)
    assert not (tmp_path / "run").exists()


def test_before_the_first_checkpoint_another_configuration_begins_anew(
    refused: Refused, call: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    """A run that diverges at its second step has written a log; the advised rate is taken in the same folder."""
    run = tmp_path / "run"
    line = refused("--learning_rate", "100", "--checkpointing_steps", "4", "--validation_steps", "1")
    assert line.startswith("step 2: ") and line.endswith("; lower --learning_rate"), line
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "log.jsonl", "samples"]
    assert call() == 0
    assert same_weights(run, finished) and log(run) == log(finished)
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 1e-4
    assert [p.name for p in (run / "samples").iterdir()] == ["step-000004.png"]


def test_weights_that_are_not_finite_are_never_saved(
    refused: Refused, call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before a checkpoint breaks one weight: neither it nor raw weights are written, and what was is whole."""
    run = tmp_path / "run"
    advance = Runner._iteration

    def broken(self: Runner, iteration: int) -> Any:
        out = advance(self, iteration)
        if iteration == 3:
            with torch.no_grad():
                self.method.student.network.conv_in.bias[2] = torch.nan
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_iteration", broken)
        line = refused()
        name = "student.denoiser.network.conv_in.bias"
        assert line == (
            f"step 4: the weight method.{name} is not finite, so nothing was saved; lower --learning_rate in another "
            f"--output_dir (--resume_from_checkpoint {run}/checkpoint-2 begins there)"
        )
        raw = ["--output_dir", f"{tmp_path}/raw", "--raw_weights.every", "4"]
        assert refused(*raw).startswith(f"step 4: the weight {name} is not finite, so nothing was saved")
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"] and not (run / "pipeline").exists()
    assert not list((tmp_path / "raw").glob("raw_weights/*"))
    with monkeypatch.context() as patch:  # the third step begins with it
        patch.setattr(Runner, "_restore", break_after(Runner._restore))
        assert refused().startswith(f"step 3: the weight {name} is not finite after the step before; lower")


def break_after(restore: Any) -> Any:
    def broken(self: Runner, source: Path) -> None:
        restore(self, source)
        with torch.no_grad():
            self.method.student.network.conv_in.bias[2] = torch.inf

    return broken


def test_the_advice_for_a_run_that_diverges_is_followed(
    call: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    """Another rate from another run's checkpoint: the rate is the new one's, the moments are the old ones."""
    start = ["--resume_from_checkpoint", f"{finished}/checkpoint-2", "--learning_rate", "3e-5"]
    assert call(*start) == 0
    assert [row["lr"] for row in log(tmp_path / "run")] == [3e-5, 3e-5]
    saved = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizers.pt", weights_only=True)
    group = saved["players"]["student"]["param_groups"][0]
    assert group["lr"] == 3e-5 and saved["players"]["student"]["state"][0]["step"] == 4
    assert not same_weights(tmp_path / "run", finished)


def test_half_precision_without_a_scaler_skips_no_step(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """accelerate's scaler is without effect on a CPU: the step would be made, and the weights be lost."""
    distance = "fewstep.distill.methods.latent_consistency.base.distance"
    monkeypatch.setattr(distance, lambda kind, x, y, c: ((x - y) * 0).sqrt().mean())
    line = refused("--mixed_precision", "fp16")
    assert line.startswith("step 1: the gradient of student is not finite on rows ")
    assert line.endswith(" of the data; use --mixed_precision bf16 or no, or lower --learning_rate")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_latents_that_are_not_finite_are_named(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, seen = LatentCache.__getitem__, []

    def broken(self: LatentCache, rows: list[int]) -> torch.Tensor:
        latents = plain(self, rows)
        seen.append(rows)
        latents[2, 1, 3, 3] = torch.nan
        return latents

    monkeypatch.setattr(LatentCache, "__getitem__", broken)
    line = refused()
    file = next(Path(os.environ["FEWSTEP_CACHE"]).glob("latents-*.rows"))
    assert line.startswith(f"step 1: the latent of row {seen[-1][2]} ('"), line
    assert line.endswith(f"') of the data is not finite; delete {file}, the command makes it again")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_teacher_that_is_not_finite_is_named(refused: Refused, tiny_pipeline: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["mid_block.resnets.0.conv1.bias"][1] = torch.inf
    save_file(weights, path, {"format": "pt"})
    assert refused("--teacher.path", str(teacher)) == (
        f"teacher.path: the weight mid_block.resnets.0.conv1.bias of {teacher} is not finite; use whole weights"
    )


def test_a_folder_in_use_is_refused(
    refused: Refused, call: Callable[..., int], finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with locked(run):
        assert refused() == (
            f"output_dir: {run} is in use by {(run / '.lock').read_text()}; wait for it, or choose another --output_dir"
        )
        assert [p.name for p in run.iterdir()] == [".lock"]
    shutil.copytree(finished, run)
    with locked(run):
        assert call() == 0  # it is finished, which needs no lock


def test_a_lock_is_held_while_it_trains(
    refused: Refused, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, lines = Runner._export, []

    def export(self: Runner) -> None:
        monkeypatch.setattr(Runner, "_export", plain)
        lines.append(refused("--max_train_steps", "4"))
        plain(self)

    monkeypatch.setattr(Runner, "_export", export)
    assert call("--max_train_steps", "4") == 0
    assert len(lines) == 1 and f"is in use by process {os.getpid()} on " in lines[0]
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: cut(run / WEIGHTS), "unet/diffusion_pytorch_model.safetensors has"),
        (lambda run: (run / WEIGHTS).unlink(), "unet/diffusion_pytorch_model.safetensors is missing"),
        (lambda run: cut(run / "pipeline/model_index.json"), "model_index.json is no JSON"),
        (lambda run: shutil.rmtree(run / "pipeline/scheduler"), "scheduler/scheduler_config.json is missing"),
        (lambda run: shutil.rmtree(run / "pipeline"), "pipeline is missing"),
        (lambda run: cut(run / "exported.json"), "exported.json: is not JSON"),
        (lambda run: (run / "exported.json").write_text('{"step": 4}'), "exported.json: folders: "),
        (lambda run: (run / "pipeline").rename(run / ".pipeline.old"), "pipeline is missing"),
    ],
)
def test_a_damaged_export_is_exported_again(
    damage: Callable[[Path], Any],
    said: str,
    run: Path,
    call: Callable[..., int],
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(run)
    capsys.readouterr()
    assert call() == 0
    warning = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("fewstep: warning: "))
    assert said in warning
    assert same_weights(run, finished) and log(run) == log(finished)
    assert not list(run.glob(".*"))
    assert call() == 0 and "is finished" in capsys.readouterr().out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_card_or_a_setting_that_was_edited_is_no_damage(
    run: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "pipeline" / "README.md").write_text("mine")
    path = run / "pipeline" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "mine"}))
    assert call() == 0
    assert "is finished" in capsys.readouterr().out and (run / "pipeline" / "README.md").read_text() == "mine"


def test_a_damaged_export_without_a_checkpoint_is_not_trained_again_unasked(
    run: Path, refused: Refused
) -> None:
    cut(run / WEIGHTS)
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert refused().endswith(
        "and there is no checkpoint to export from; choose another --output_dir, or remove "
        f"{run}/exported.json to train anew"
    )


def test_a_damaged_newest_checkpoint_is_kept_aside_and_the_one_before_gone_on_from(
    run: Path, call: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "exported.json").unlink()
    cut(run / "checkpoint-4" / "optimizers.pt")
    assert call() == 0
    warning = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("fewstep: warning: "))
    assert f"{run}/checkpoint-4 is cut short or unreadable (" in warning
    assert "kept as checkpoint-4.damaged, the run goes on from checkpoint-2" in warning
    assert sorted(p.name for p in run.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-4.damaged",
    ]  # fmt: skip
    assert same_weights(run, finished) and log(run) == log(finished)


def test_a_batch_of_another_size_is_refused_and_another_split_of_it_is_not(
    run: Path, refused: Refused, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "exported.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused() == (
        f"train_batch_size: 4 x 1 accumulated x 2 processes are 8 pictures a step, {run} was started with 4; "
        "set --train_batch_size 2, or choose another --output_dir"
    )
    monkeypatch.delenv("WORLD_SIZE")
    assert refused("--train_batch_size", "3").startswith(
        "train_batch_size: 3 x 1 accumulated x 1 processes are 3"
    )
    line = refused("--train_batch_size", "3", "--seed", "1")
    assert line == (
        f"output_dir: {run} was started with another seed; use the same values or another --output_dir"
    )
    assert call("--train_batch_size", "2", "--gradient_accumulation_steps", "2") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")  # a finished run is looked at by as many processes as one likes
    assert call() == 0
    training = json.loads((run / "exported.json").read_text())["training"]
    assert (training["images"], training["batch"]) == (16, 4)


def test_a_signal_in_the_set_up_leaves_nothing(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fewstep.distill.training.assembly.save_memory", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    assert call() == 143
    assert not (tmp_path / "run").exists()
