"""A user's mistake is one line that names key or file, value and remedy, exit code 2; what was saved stays intact."""

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from fewstep.distill.cli import main
from fewstep.distill.training.runner import Runner
from PIL import Image
from safetensors.torch import load_file, save_file

Refused = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a tiny latent consistency distillation; tests give --output_dir."""
    path = tmp_path_factory.mktemp("config") / "lcd.yaml"
    tree = {
        "output_dir": "unset",
        "teacher": {"path": str(tiny_pipeline)},
        "data": {"name": "emoji-noto"},
        "method": {"name": "lcd", "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 4,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": None,
        "validation_steps": 2,
        "validation_prompts": ["red cat"],
        "raw_weights": {"every": 2},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which `fewstep distill CONFIG --output_dir tmp/run *arguments` ends."""

    def call(*arguments: str, output_dir: Path = tmp_path / "run") -> str:
        assert main(["distill", str(config), "--output_dir", str(output_dir), *arguments]) == 2
        written = capsys.readouterr().err
        assert "Traceback" not in written
        lines = [line for line in written.splitlines() if line.startswith("fewstep: error: ")]
        assert len(lines) == 1 and written.endswith(lines[0] + "\n"), written
        return lines[0].removeprefix("fewstep: error: ")

    return call


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copy it before anything is changed in it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["distill", str(config), "--output_dir", str(run)]) == 0
    return run


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def images(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (80 * i, 40, 200)).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": "red cat"} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--learning_rat", "1"], "learning_rat: no such key; the nearest is learning_rate"),
        (["--data.nme", "emoji"], "data.nme: no such key; the nearest is name"),
        (
            ["--max_train_steps", "few"],
            "max_train_steps: 'few' does not fit: input should be a valid integer",
        ),
        (["--method.name", "lcdx"], "method.name: there is no method 'lcdx'; the nearest is lcd"),
    ],
)
def test_keys_and_types(arguments: list[str], line: str, refused: Refused, tmp_path: Path) -> None:
    assert refused(*arguments) == line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--method.w_min", "4"], "method.w_min: 4.0 is above method.w_max 3.0"),
        (["--method.w_export", "7"], "method.w_export: 7.0 is outside the trained range 1.0..3.0"),
        (["--method.num_ddim_timesteps", "7"], "method.num_ddim_timesteps: 7 does not divide"),
        (["--teacher", "null", "--resolution", "16"], "teacher: missing; this method needs `teacher: {path: ...}`"),
        (["--teacher", "null"], "teacher: missing; this method needs `teacher: {path: ...}`"),
        (["--teacher", "null", "--method", "{name: ict}", "--student", "{init: scratch}"],
         "resolution: missing; without `teacher: {path: ...}` the image size must be given"),
        (["--data.split", "trian"], "emoji-noto: "),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(arguments: list[str], line: str, refused: Refused) -> None:
    assert refused(*arguments).startswith(line)


def test_a_missing_teacher_folder(refused: Refused, tmp_path: Path) -> None:
    assert refused("--teacher.path", f"{tmp_path}/none") == (
        f"teacher.path: no folder {tmp_path}/none; give a pipeline folder, a hub id or one of: emoji-sd, fashion-edm"
    )
    (tmp_path / "empty").mkdir()
    line = refused("--teacher.path", f"{tmp_path}/empty", output_dir=tmp_path / "other")
    assert line.endswith("/empty has no model_index.json; give a diffusers pipeline folder")


@pytest.mark.parametrize("damage", ["entry", "null", "folder", "weights"])
def test_a_damaged_teacher(damage: str, refused: Refused, tiny_pipeline: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_pipeline, teacher)
    index = teacher / "model_index.json"
    tree = json.loads(index.read_text())
    if damage == "entry":
        del tree["scheduler"]
    elif damage == "null":
        tree["scheduler"] = [None, None]
    elif damage == "folder":
        shutil.rmtree(teacher / "scheduler")
    else:
        path = teacher / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    index.write_text(json.dumps(tree))
    line = refused("--teacher.path", str(teacher))
    assert line.startswith(f"teacher.path: {teacher} ")
    lacking = line.endswith(f"{teacher} has no scheduler; save the pipeline with its scheduler")
    assert lacking == (damage != "weights")
    assert lacking or line.endswith("; save it again")


def test_a_hub_id_without_network(refused: Refused, tmp_path: Path) -> None:
    line = refused("--teacher.path", "nobody/nothing")
    assert line.startswith("teacher.path: nobody/nothing could not be fetched from the hub (")
    assert line.endswith("; check the name and the network, or give a local pipeline folder")
    line = refused("--data.name", "nobody/nothing", output_dir=tmp_path / "other")
    assert line.startswith("nobody/nothing: ")


def test_an_empty_data_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert refused("--data.name", f"{tmp_path}/data").startswith(f"{tmp_path}/data: ")


def test_an_unreadable_image(refused: Refused, tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    (data / "1.png").write_bytes((data / "1.png").read_bytes()[:40])
    line = refused("--data.name", str(data))
    assert line.startswith(f"{data}/1.png: cannot be read as an image") and line.endswith("mend or remove it")


def test_pictures_without_captions(refused: Refused, config: Path, tmp_path: Path) -> None:
    data, run = images(tmp_path / "data"), tmp_path / "run"
    (data / "metadata.jsonl").unlink()
    line = refused("--data.name", str(data))
    assert line.startswith(f"data.name: {data} has no captions") and "data.caption_column" in line
    assert not run.exists()
    arguments = ["--data.name", str(data), "--output_dir", str(run), "--max_train_steps", "1"]
    assert main(["distill", str(config), *arguments, "--data.caption_column", "null"]) == 0


def test_masks_in_place_of_pictures(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images(tmp_path / "data")
    for i in range(3):
        Image.frombytes("L", (16, 16), bytes([0, 1] * 128)).save(data / f"{i}.png")
    line = f"{data}/0.png: cannot be read as an image (it holds only 0 and 1 of 0 to 255"
    assert refused("--data.name", str(data)).startswith(line)
    capsys.readouterr()
    assert main(["evaluate", str(data), "--data", "emoji", "--num_images", "3"]) == 2
    (told,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("fewstep: error: ")]
    assert f"{data}/" in told and "holds only 0 and 1" in told


@pytest.mark.parametrize("name", ["state.safetensors", "optimizers.pt"])
def test_a_checkpoint_cut_short(
    name: str, refused: Refused, config: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "exported.json").unlink()
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = hashes(run)
    assert refused("--resume_from_checkpoint", "checkpoint-4") == (
        f"resume_from_checkpoint: {run}/checkpoint-4 is cut short or unreadable; "
        "delete it and repeat the command, the run then goes on from checkpoint-2"
    )
    assert hashes(run) == before
    shutil.rmtree(run / "checkpoint-4")
    assert main(["distill", str(config), "--output_dir", str(run)]) == 0
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert hashes(run)[weights] == hashes(finished)[weights]


def test_a_checkpoint_of_a_run_with_or_without_averages(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    line = refused("--resume_from_checkpoint", str(source), "--use_ema", "true")
    assert line.startswith(f"use_ema: true, but {source} holds no averages; set it to false, or ")
    state = load_file(source / "state.safetensors")
    save_file({**state, "ema.updates": torch.tensor(2)}, source / "state.safetensors")
    line = refused("--resume_from_checkpoint", str(source), output_dir=tmp_path / "other")
    assert line.startswith(f"use_ema: false, but {source} was trained with averages; set it to true, or ")


@pytest.mark.parametrize(
    "content", [b"", b'{"step": 4', b"\xff", b"null", b"{}", b"[" * 100_000, b'{"step": -1}']
)
def test_after_a_damaged_record_of_what_was_exported_it_is_exported_again(
    content: bytes, config: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    sound = json.loads((run / "exported.json").read_text())
    (run / "exported.json").write_bytes(content)
    assert main(["distill", str(config), "--output_dir", str(run)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: warning: ")]
    assert len(lines) == 1 and f"{run}/exported.json: " in lines[0]
    again = json.loads((run / "exported.json").read_text())
    assert (again["step"], again["folders"]) == (sound["step"], sound["folders"])


@pytest.mark.parametrize("moment", ["_save", "_save_raw", "_log", "_pictures", "_export"])
def test_a_full_disk(
    moment: str,
    refused: Refused,
    config: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From step 4 on no file grows beyond a few bytes; with room again the same command ends as it should."""
    run = tmp_path / "run"
    plain, room = getattr(Runner, moment), resource.getrlimit(resource.RLIMIT_FSIZE)
    saved: dict[str, str] = {}

    def crowded(self: Runner, *arguments: Any) -> None:
        if self.step < 4:
            return plain(self, *arguments)
        saved.update({k: v for k, v in hashes(run).items() if k.startswith(("checkpoint-", "raw_weights"))})
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, room[1]))
        try:
            return plain(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, moment, crowded)
        line = refused()
    assert line.startswith(f"output_dir: {run}/")
    assert line.endswith("could not be written (File too large); free space or choose another --output_dir; "
                         "what was saved before is intact")  # fmt: skip
    now = hashes(run)
    assert "checkpoint-2/state.safetensors" in saved and {k: now[k] for k in saved} == saved
    assert not list(run.rglob("*.partial"))
    assert main(["distill", str(config), "--output_dir", str(run)]) == 0
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert hashes(run)[weights] == hashes(finished)[weights]


def test_an_output_folder_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(output_dir=tmp_path / "file" / "run")
    assert line.startswith(f"output_dir: {tmp_path}/file/run could not be written (Not a directory)")


def test_a_finished_run_repeated_says_so_and_changes_nothing(
    config: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(finished)
    assert main(["distill", str(config), "--output_dir", str(finished)]) == 0
    assert f"{finished} is finished: 4 steps" in capsys.readouterr().out
    free = ["--logging_steps", "7", "--report_to", "tensorboard", "--checkpoints_total_limit", "9"]
    assert main(["distill", str(config), "--output_dir", str(finished), *free]) == 0
    assert hashes(finished) == before


def test_a_changed_configuration_names_the_keys(refused: Refused, finished: Path) -> None:
    before = hashes(finished)
    changes = ["--seed", "1", "--method.w_max", "4", "--data.split", "holdout", "--logging_steps", "3"]
    assert refused(*changes, output_dir=finished) == (
        f"output_dir: {finished} was started with another method.w_max, data.split, seed; "
        "use the same values or another --output_dir"
    )
    assert hashes(finished) == before


def test_an_unreadable_record_of_the_configuration(refused: Refused, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("")
    assert refused().startswith(f"{tmp_path}/run/config.yaml holds no")


def test_what_a_method_refuses_leaves_no_folder(refused: Refused, tmp_path: Path) -> None:
    lora = ["--student.kind", "lora", "--method.guidance_dim", "256"]
    line = refused(*lora, "--student.target_modules", "[nowhere]")
    assert line.startswith("student.target_modules: ") and not (tmp_path / "run").exists()


def test_which_checkpoint_to_resume_from(refused: Refused, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "exported.json").unlink()
    assert refused("--resume_from_checkpoint", "checkpoint-3") == (
        f"resume_from_checkpoint: no checkpoint-3 in {run}; there are: checkpoint-2, checkpoint-4"
    )
    assert refused("--resume_from_checkpoint", "null").startswith("resume_from_checkpoint: null, but")


@pytest.mark.skipif(find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_where_it_is_missing(refused: Refused) -> None:
    line = refused("--enable_xformers_memory_efficient_attention")
    assert line.startswith("enable_xformers_memory_efficient_attention: xformers cannot run beside torch ")
    assert line.endswith("install the xformers build for this torch on a GPU machine, or leave the key off")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed(refused: Refused) -> None:
    assert refused("--report_to", "wandb") == (
        "report_to: wandb is not installed; pip install wandb, or leave the key off"
    )


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (lambda kind, x, y, c: (x - y).mean() * torch.inf, "step 1: the loss of student is inf on rows "),
        (
            lambda kind, x, y, c: ((x - y) * 0).sqrt().mean(),
            "step 1: the gradient of student is not finite on rows ",
        ),
    ],
)
def test_a_step_that_is_not_finite(
    loss: Callable[..., torch.Tensor], line: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.distill.methods.latent_consistency.base.distance", loss)
    said = refused()
    assert said.startswith(line) and said.endswith(" of the data; lower --learning_rate")
    assert len(said.removeprefix(line).partition(" of ")[0].split(", ")) == 2  # train_batch_size
