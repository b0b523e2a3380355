"""One trajectory: killed, interrupted, split into processes or accumulated, a run ends where the plain one ends."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file
from torch import Tensor

from ..runs import lasting, train, train_in_two_processes

STEPS = 8
KILLED_WHILE_SAVING_6 = """
import os, signal, sys
from fewstep.distill import cli
from fewstep.distill.training import checkpoint

save = checkpoint.save_objects

def kill_or_save(value, path):
    if path.parent.name == ".checkpoint-6.partial":
        path.write_bytes(b"cut")
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, path)

checkpoint.save_objects = kill_or_save
sys.exit(cli.main(sys.argv[1:]))
"""


class Crash(BaseException):
    """Ends a run at once, past every handler."""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def settings(teacher: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run of latent consistency distillation. Adam's epsilon is far above the rounding of the gradients, so
    that another order of sums stays a small difference."""
    width = {} if changes.get("student", {}).get("kind") == "lora" else {"guidance_dim": 16}
    return {
        "output_dir": str(output),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji"},
        "method": {"name": "lcd", **width, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 5e-5,
        "lr_scheduler": "cosine",
        "adam_epsilon": 1e-3,
        "use_ema": True,
        "ema_decay": 0.8,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        **changes,
    }


def command(tree: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["distill", str(path)]


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [lasting(line) for line in lines]


def exported(run: Path) -> dict[str, Tensor]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def state(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Trained weights, target and EMA of a checkpoint."""
    return load_file(run / f"checkpoint-{step}" / "state.safetensors")


def assert_same_run(run: Path, reference: Path) -> None:
    """Bit for bit: exported weights, training weights, target network, EMA, and every line of the log."""
    for one, other in ((exported(run), exported(reference)), (state(run), state(reference))):
        assert one.keys() == other.keys()
        assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert log(run) == log(reference)
    progress = json.loads((run / f"checkpoint-{STEPS}" / "progress.json").read_text())
    assert progress["updates"] == {"student": STEPS}
    assert not list(run.glob(".*.partial"))


def assert_near_run(run: Path, reference: Path, tolerance: float) -> None:
    ours, theirs = log(run), log(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance), a["step"]
    one, other = exported(run), exported(reference)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(settings(tiny_pipeline, run, raw_weights={"every": 2, "keep": 2}, report_to="tensorboard"))
    return run


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a finished LoRA run; its dropout draws from the global generator."""
    student = {"kind": "lora", "rank": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    tree = settings(tiny_pipeline, tmp_path_factory.mktemp("lora") / "run", student=student)
    train(tree)
    return tree


def test_the_run_folder(reference: Path) -> None:
    names = {p.name for p in reference.iterdir()} - {"fewstep"}
    assert names == {
        "config.yaml", "log.jsonl", "checkpoint-6", "checkpoint-8", "raw_weights", "pipeline", "exported.json",
        "samples",
    }  # fmt: skip
    training = json.loads((reference / "exported.json").read_text())["training"]
    weights = sum(v.numel() for v in exported(reference).values())
    assert (training["steps"], training["images"]) == (STEPS, 4 * STEPS)
    assert training["trained_parameters"] == weights and training["seconds"] > 0
    losses = [line["loss"] for line in log(reference)]
    assert len(losses) == STEPS and len(set(losses)) == STEPS
    rates = [line["lr"] for line in log(reference)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0, abs=1e-9)


def test_training_moves_the_weights_and_the_averages_behind_them(
    reference: Path, tiny_pipeline: Path
) -> None:
    start = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    name = "student.denoiser.network.conv_in.weight"
    saved = state(reference)
    now, target = saved[f"method.{name}"], saved["method.target.conv_in/weight"]
    average = saved[f"ema.{name.replace('.', '/')}"]
    assert (now - start).abs().max() > 1e-5
    for lagging in (target, average):
        assert not torch.equal(lagging, now) and not torch.equal(lagging, start)
        assert (lagging - start).norm() < (now - start).norm()


def test_raw_weights_are_the_newest_and_those_of_the_training(reference: Path) -> None:
    saved = sorted((reference / "raw_weights").iterdir())
    assert [p.name for p in saved] == ["step-00000006.safetensors", "step-00000008.safetensors"]
    for path, step in zip(saved, (6, 8), strict=True):
        raw, whole = load_file(path), state(reference, step)
        assert raw and all(torch.equal(raw[k], whole[f"method.{k}"]) for k in raw)


def test_tensorboard_gets_an_event_file(reference: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference / "fewstep")).Reload()
    seen = [e.value for e in events.Scalars("loss")]
    assert seen == pytest.approx([line["loss"] for line in log(reference)])


def test_the_export_has_the_averages_and_training_goes_on_without_them(
    reference: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    runner = train(settings(tiny_pipeline, tmp_path / "run"))
    saved, out = state(tmp_path / "run"), exported(tmp_path / "run")
    weights = dict(runner.method.named_parameters())
    for name in (k.removeprefix("method.") for k in saved if k.startswith("method.student.")):
        average = saved[f"ema.{name.replace('.', '/')}"]
        assert torch.equal(out[name.removeprefix("student.denoiser.network.")], average), name
        assert torch.equal(weights[name], saved[f"method.{name}"]), name
        assert torch.equal(runner.ema.tensors()[name], average), name
    assert_same_run(tmp_path / "run", reference)


def test_killed_while_it_saves_and_repeated_it_is_the_same_run(
    reference: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command(settings(tiny_pipeline, run), tmp_path)
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING_6, *arguments], timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert (run / ".checkpoint-6.partial" / "state.safetensors").is_file()
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert len(log(run)) == 6 and not (run / "pipeline").exists()
    assert main(arguments) == 0
    assert_same_run(run, reference)


@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_a_crash_at_any_step_changes_nothing(
    step: int, reference: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = settings(tiny_pipeline, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        stop_after_logging(patch, step, lambda: raise_(Crash()))
        train(tree)
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    train(tree)
    assert_same_run(tmp_path / "run", reference)


def test_a_lora_run_with_dropout_resumes_on_its_trajectory(
    lora: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        stop_after_logging(patch, 5, lambda: raise_(Crash()))
        train({**lora, "output_dir": str(run)})
    train({**lora, "output_dir": str(run)})
    assert_same_run(run, Path(lora["output_dir"]))


def test_pictures_change_nothing(lora: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train({**lora, "output_dir": str(run), "validation_steps": 3, "validation_prompts": ["red cat"]})
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-000003.png", "step-000006.png", "step-000008.png",
    ]  # fmt: skip
    assert_same_run(run, Path(lora["output_dir"]))


def test_a_loras_checkpoint_holds_the_adapter_alone(lora: dict[str, Any]) -> None:
    saved = state(Path(lora["output_dir"]))
    assert {k for k in saved if "lora_" not in k} == {"ema.updates"}
    assert any((saved[k] != 0).any() for k in saved if k.startswith("method.") and "lora_B" in k)


def test_ctrl_c_saves_and_exports_and_the_same_command_goes_on(
    reference: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    arguments = command(settings(tiny_pipeline, run), tmp_path)
    with monkeypatch.context() as patch:
        stop_after_logging(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert main(arguments) == 130
    assert "interrupted at step 3" in capsys.readouterr().out
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    average = state(run, 3)["ema.student/denoiser/network/conv_in/weight"]
    assert torch.equal(exported(run)["conv_in.weight"], average)
    assert main(arguments) == 0
    assert "is finished" not in capsys.readouterr().out
    assert_same_run(run, reference)


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT, signal.SIGTERM], 143),
    ],
)
def test_sigterm_and_sighup_save_at_once_and_the_same_command_goes_on(
    signals: list[int],
    code: int,
    reference: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also right after Ctrl-C, as launchers send it."""
    run = tmp_path / "run"
    arguments = command(settings(tiny_pipeline, run), tmp_path)
    with monkeypatch.context() as patch:
        stop_after_logging(patch, 3, lambda: [signal.raise_signal(s) for s in signals])
        assert main(arguments) == code
    assert "interrupted at step 3: saved, not exported; repeat the command" in capsys.readouterr().out
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (run / "pipeline").exists() and not (run / ".lock").exists()
    assert main(arguments) == 0
    assert_same_run(run, reference)


def test_sigterm_while_ctrl_c_exports_loses_nothing(
    reference: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    arguments = command(settings(tiny_pipeline, run), tmp_path)

    def terminated(*_: Any) -> None:
        assert list(run.glob(".pipeline.partial"))
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        stop_after_logging(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        patch.setattr("fewstep.distill.training.run_export.write_export", terminated)
        assert main(arguments) == 143
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not list(run.glob("*pipeline*"))
    assert main(arguments) == 0
    assert_same_run(run, reference)


def test_an_older_checkpoint_can_be_chosen(reference: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = settings(tiny_pipeline, run, checkpoints_total_limit=None)
    train(tree)
    (run / "exported.json").unlink()
    path = run / "checkpoint-4" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({**progress, "seconds": 1000.0}))
    train({**tree, "resume_from_checkpoint": "checkpoint-4"})
    assert_same_run(run, reference)
    assert 1000 < json.loads((run / "exported.json").read_text())["training"]["seconds"] < 1500


def test_a_checkpoint_of_another_run_is_exported_or_gone_on_from(
    reference: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    run, early, on, back = (tmp_path / name for name in ("run", "early", "on", "back"))
    train(settings(tiny_pipeline, run, checkpoints_total_limit=None))
    start = {"resume_from_checkpoint": str(run / "checkpoint-4")}
    train(settings(tiny_pipeline, early, max_train_steps=4, **start))
    average = state(run, 4)["ema.student/denoiser/network/conv_in/weight"]
    assert torch.equal(exported(early)["conv_in.weight"], average)
    assert not list(early.glob("checkpoint-*"))
    train(settings(tiny_pipeline, on, **start))
    last = exported(reference)
    assert not torch.equal(last["conv_in.weight"], average)
    assert all(torch.equal(v, last[k]) for k, v in exported(on).items())
    with pytest.raises(UserError, match=r"max_train_steps: 3 is less than .*checkpoint-4; raise it"):
        train(settings(tiny_pipeline, back, max_train_steps=3, **start))
    assert not back.exists()


def test_accumulated_half_batches_follow_the_full_batch(
    reference: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    tree = settings(tiny_pipeline, tmp_path / "run", train_batch_size=2, gradient_accumulation_steps=2)
    train(tree)
    assert_near_run(tmp_path / "run", reference, 1e-6)


def test_two_processes_follow_one(reference: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_in_two_processes(settings(tiny_pipeline, run, train_batch_size=2), tmp_path)
    assert_near_run(run, reference, 1e-6)


def test_a_run_is_taken_up_by_two_processes_with_half_the_batch_each(
    reference: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ACCELERATE_USE_CPU: torchrun on a machine without a device starts one run of two processes, not two."""
    run = tmp_path / "run"
    tree = settings(tiny_pipeline, run)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        stop_after_logging(patch, 5, lambda: raise_(Crash()))
        train(tree)
    if not torch.accelerator.is_available():
        monkeypatch.delenv("ACCELERATE_USE_CPU")
    train_in_two_processes({**tree, "train_batch_size": 2}, tmp_path)
    assert_near_run(run, reference, 1e-6)
    assert json.loads((run / "exported.json").read_text())["training"]["images"] == 4 * STEPS


def test_gradient_checkpointing_changes_nothing(reference: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    runner = train(settings(tiny_pipeline, tmp_path / "run", gradient_checkpointing=True))
    assert runner.method.student.network.is_gradient_checkpointing
    assert_near_run(tmp_path / "run", reference, 1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bfloat16_stays_near_full_precision(
    kind: str, reference: Path, lora: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    student = {} if kind == "full" else {"student": lora["student"]}
    plain = reference if kind == "full" else Path(lora["output_dir"])
    tree = settings(tiny_pipeline, tmp_path / "run", mixed_precision="bf16", validation_steps=4, **student)
    runner = train(tree)
    assert {p.dtype for p in runner.players["student"]} == {torch.float32}
    assert {p.dtype for p in runner.batches.prompts.records.read([0]).values()} == {torch.bfloat16}
    for ours, theirs in zip(log(tmp_path / "run"), log(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
    assert len(list((tmp_path / "run" / "samples").glob("step-*.png"))) == 2
    assert {v.dtype for v in exported(tmp_path / "run").values()} == {torch.float32}


def raise_(error: BaseException) -> None:
    raise error


def stop_after_logging(patch: pytest.MonkeyPatch, step: int, stop: Any) -> None:
    """`stop()` runs once step `step` is logged, before its checkpoint."""
    plain = Runner._log

    def logged(self: Runner, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.step == step:
            stop()

    patch.setattr(Runner, "_log", logged)
