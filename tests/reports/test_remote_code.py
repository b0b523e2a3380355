"""Pipelines that bring their code: ours runs unasked, another only when it is trusted; `evaluate` and `compare`."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from fewstep.distill.cli import main
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from fewstep.distill.metrics import reference
from fewstep.distill.models import teacher
from fewstep.distill.reports import compare as comparing
from fewstep.distill.reports import loading, remote_code
from fewstep.distill.reports.compare import compare
from fewstep.distill.reports.conditions import control_in
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.opening import open_source
from fewstep.distill.reports.pipeline_source import PipelineSource
from fewstep.distill.reports.remote_code import may_run
from PIL import Image

from ..tiny_classes import CLASSES, class_data, consistency_folder

CPU = torch.device("cpu")
CODE = '''
"""A class and noise make a picture in one step."""
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class TinyPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=1, generator=None, output_type="pil"):
        side = self.unet.config.sample_size
        noise = randn_tensor((len(class_labels), self.unet.config.in_channels, side, side), generator)
        labels = torch.tensor(class_labels)
        sample = self.unet(noise, torch.tensor(1.0), class_labels=labels).sample / 1.0
        return ImagePipelineOutput(images=(sample / 2 + 0.5).clamp(0, 1))
'''


def files(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where diffusers copies code to, and what it was told about it."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(reference, "load_data", class_data)
    return tmp_path / "modules"


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of our own pipelines, with pipeline_tiny.py in it."""
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "pipeline_tiny.py").write_text(CODE)
    monkeypatch.setattr(remote_code, "OURS", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline with its class in a file beside the index."""
    folder = consistency_folder(tmp_path / "own", channels=1, classes=3)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline_tiny", "TinyPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline_tiny.py").write_text(CODE)
    (folder / "sampling.json").write_text(json.dumps({"1": {"num_inference_steps": 1}}))
    return folder


def test_code_of_ours_runs_unasked_and_leaves_the_folder_as_it_was(
    folder: Path, ours: Path, modules: Path
) -> None:
    before = files(folder)
    source = open_source(str(folder), CPU)
    made, _ = source.pictures(range(2), Inputs("class", [1, 2]), 0, {"num_inference_steps": 1})
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for picture, seed, label in zip(made.int(), (0, 1), (1, 2), strict=True):
        draw = torch.Generator().manual_seed(seed)
        alone = pipe([label], generator=draw).images
        assert ((alone[0] * 255).round() - picture).abs().max() <= 1
    assert (source.conditioning, source.num_classes, source.grey) == ("class", 3, True)
    assert files(folder) == before
    copied = {name for name in files(modules) if "__pycache__" not in name}
    assert copied == {
        "__init__.py",
        "diffusers_modules/__init__.py",
        "diffusers_modules/local/__init__.py",
        "diffusers_modules/local/pipeline_tiny.py",
    }


@pytest.mark.parametrize("change", ["edited", "beside", "component"])
def test_other_code_is_refused_until_it_is_trusted(
    change: str, folder: Path, ours: Path, modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"edited": "pipeline_tiny.py", "beside": "helper.py", "component": "unet/helper.py"}[change]
    with (folder / place).open("a") as file:
        file.write("\nRAN = True\n")
    flags = ["--data", "classes", "--num_images", "4", "--steps", "1", "--device", "cpu"]
    assert main(["evaluate", str(folder), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"fewstep: error: {folder}: runs code of its own, {place}; read it, and give --trust_remote_code "
        "if you trust it"
    )
    assert not modules.exists()
    assert main(["evaluate", str(folder), *flags, "--trust_remote_code"]) == 0
    assert "conditioning: class" in capsys.readouterr().out


def test_code_in_a_linked_folder_is_seen(folder: Path, ours: Path, tmp_path: Path) -> None:
    shutil.move(folder / "unet", tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert may_run(folder, False)
    (tmp_path / "elsewhere" / "diffusers.py").write_text("RAN = True\n")
    with pytest.raises(UserError, match=r"runs code of its own, unet/diffusers\.py"):
        may_run(folder, False)


def test_pipelines_without_code_are_never_trusted(folder: Path, ours: Path, tiny_pipeline: Path) -> None:
    assert not may_run(tiny_pipeline, True) and not may_run(tiny_pipeline, False)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ConsistencyModelPipeline"}))
    (folder / "train.py").write_text("raise SystemExit")  # nobody runs it
    assert not may_run(folder, False)
    (folder / "scheduler" / "diffusers.py").write_text("raise SystemExit")  # diffusers would
    with pytest.raises(UserError, match="runs code of its own"):
        may_run(folder, False)


def test_a_class_without_its_file_is_one_line(folder: Path, ours: Path) -> None:
    (folder / "pipeline_tiny.py").unlink()
    with pytest.raises(UserError, match=r"its class is in pipeline_tiny\.py, which is not there; copy it"):
        open_source(str(folder), CPU)


def test_code_from_the_hub_is_refused_until_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """A hub id that diffusers resolves to a snapshot: the folder, under another name."""
    plain, asked = DiffusionPipeline.from_pretrained, []

    def from_pretrained(name: str, **how: Any) -> Any:
        asked.append(how["trust_remote_code"])
        return plain(folder, **how)

    monkeypatch.setattr(loading.DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "_sampling_of_hub", lambda name: None)
    with pytest.raises(UserError, match=r"^someone/tiny: runs code of its own; read it, and give --trust"):
        open_source("someone/tiny", CPU)
    source = open_source("someone/tiny", CPU, trust_remote_code=True)
    assert source.conditioning == "class" and asked == [False, True]


def test_the_code_is_part_of_what_made_the_pictures(folder: Path, ours: Path) -> None:
    one = PipelineSource(str(folder), CPU).identity()
    assert PipelineSource(str(folder), CPU).identity() == one
    for path in (folder / "pipeline_tiny.py", ours / "pipeline_tiny.py"):
        path.write_text(CODE.replace("/ 1.0", "/ 2.00"))
    assert PipelineSource(str(folder), CPU).identity() != one


def test_a_fresh_process_without_network(folder: Path, ours: Path, modules: Path) -> None:
    """As a user calls it: the command line, diffusers' own place for code, and nothing from the hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    code = (
        "import sys, torch; from pathlib import Path; from fewstep.distill.reports import remote_code\n"
        "from fewstep.distill.reports.opening import open_source\n"
        "from fewstep.distill.reports.inputs import Inputs\n"
        f"remote_code.OURS = Path({str(ours)!r})\n"
        f"source = open_source({str(folder)!r}, torch.device('cpu'))\n"
        "print(source.pictures(range(3), Inputs('class', [0]), 0, {})[0].shape)"
    )
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "torch.Size([3, 3, 16, 16])"


def test_an_embedded_teacher_with_code_is_evaluated_and_compared(
    folder: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compare scores in this process, where the data and the teacher are known."""
    monkeypatch.setitem(teacher.EMBEDDED, "tiny-classes", folder)

    def score(model: Any, steps: Any, shared: Any, reports: Path) -> dict[str, Any]:
        how = {"data": "classes", "num_images": 8, "batch_size": 4, "device": "cpu", "progress": False}
        return evaluate(model.pipeline, steps=steps, **how)

    monkeypatch.setattr(comparing, "_score", score)
    stock = consistency_folder(tmp_path / "stock", channels=1, classes=4)
    entries = ["tiny-classes", str(stock)]
    record = compare(entries, tmp_path / "out", steps=[1], data="classes", num_images=8, device="cpu")
    assert [(r["model"], r["export"]) for r in record["rows"]] == [
        ("tiny-classes", "remote code"),
        ("stock", "stock"),
    ]
    turns = [CLASSES[i % 3] for i in range(12)]
    assert record["strips"][0]["captions"] == [{"text": name, "seen": True} for name in turns]
    first, second = (tmp_path / "out" / p["file"] for p in record["strips"][0]["pictures"])
    assert Image.open(first).size == (12 * 16, 16) and first.read_bytes() != second.read_bytes()
    pipe = DiffusionPipeline.from_pretrained(stock)
    for i in (1, 5, 11):
        draw = torch.Generator().manual_seed(i)
        alone = pipe(class_labels=i % 3, generator=draw, output_type="pt").images[0, 0] * 255
        drawn = torch.from_numpy(np.array(Image.open(second)))[:, 16 * i : 16 * i + 16, 0]
        assert (alone - drawn).abs().max() <= 1
    assert "conditioning: class" in (tmp_path / "out" / "compare.md").read_text()
    assert open_source("tiny-classes", CPU).identity() == open_source(str(folder), CPU).identity()


def test_compare_hands_the_trust_on(
    folder: Path, data_folder: Path, modules: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From its command line to the process that scores, and to the one that draws."""
    monkeypatch.setattr(reference, "load_data", load_data)
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
    code = CODE.replace("class_labels, num_", "batch_size, num_").replace("len(class_labels)", "batch_size")
    code = code.replace("labels = torch.tensor(class_labels)", "labels = torch.zeros(batch_size).long()")
    code = code.replace("batch_size, num_", "batch_size=1, num_")
    (folder / "pipeline_tiny.py").write_text(code)
    flags = ["--data", str(data_folder), "--num_images", "4", "--seeds", "1", "--steps", "1"]
    command = ["compare", str(folder), "--output", str(tmp_path / "out"), "--teacher", "none", *flags]
    assert main([*command, "--device", "cpu"]) == 2
    assert "own: " in (said := capfd.readouterr().err) and "give --trust_remote_code if you trust it" in said
    assert main([*command, "--device", "cpu", "--trust_remote_code"]) == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [p["file"] for p in record["strips"][0]["pictures"]] == ["pictures/own-1.png"]
    assert record["strips"][0]["captions"] == [{"text": "", "seen": True}] * 8


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ('RuntimeError("first line\\nsecond")', "fails (RuntimeError: first line)"),
        ("AttributeError()", "fails (AttributeError)"),
        ("AssertionError()", "fails (AssertionError)"),
        ('KeyError("prompt")', "fails (KeyError: 'prompt')"),
        ("StopIteration()", "fails (StopIteration)"),
        ('OSError(28, "No space left")', "fails (OSError: [Errno 28] No space left)"),
        ('ValueError("odd")', "refuses the call (odd)"),
        ("MemoryError()", "needs more memory than there is (MemoryError); lower --batch_size"),
        ('torch.OutOfMemoryError("CUDA")', "needs more memory than there is (CUDA); lower --batch_size"),
        ('RuntimeError("can\'t allocate memory: 9")', "needs more memory than there is"),
        ('type("Own", (Exception,), {})("mine")', "fails (Own: mine)"),
    ],
)
def test_a_pipeline_that_raises_anything_is_one_line(
    raised: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = CODE.replace("side = self", f"raise {raised}\n        side = self")
    (folder / "pipeline_tiny.py").write_text(code)
    flags = ["--data", "classes", "--num_images", "4", "--steps", "1", "--device", "cpu"]
    for verb in ("evaluate", "sample"):
        output = tmp_path / "out" / verb
        command = [verb, str(folder), *flags, "--output", str(output), "--trust_remote_code"]
        assert main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"fewstep: error: {folder}: TinyPipeline {said}"), line
        assert not list(output.glob("*.png")) and not output.is_file()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("None", "gives neither RGB nor grey pictures"),
        ("'x'", "gives neither RGB nor grey pictures"),
        ("(sample * 255).byte()", "gives neither RGB nor grey pictures in [0, 1]"),
        ("sample.permute(0, 2, 3, 1).byte().numpy()", "gives neither RGB nor grey pictures in [0, 1]"),
        ("sample.permute(0, 2, 3, 1).numpy().astype(object)", "gives neither RGB nor grey pictures"),
        ("sample.expand(-1, 2, -1, -1)", "gives neither RGB nor grey pictures"),
        ("sample[:1]", "gives 1 pictures for 2 inputs"),
        ("sample / 0", "the pictures hold NaN or infinity"),
        ("sample[..., 1:]", "scores need square ones"),
    ],
)
def test_what_a_pipeline_gives_is_checked(images: str, said: str, folder: Path) -> None:
    code = CODE.replace("images=(sample / 2 + 0.5).clamp(0, 1)", f"images={images}")
    (folder / "pipeline_tiny.py").write_text(code)
    source = open_source(str(folder), CPU, trust_remote_code=True)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        source.pictures(range(2), Inputs("class", [1, 2]), 0, {"num_inference_steps": 1})
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b'{"control"', b"\xff", b"null", b"{}", b'{"control": "canny"}', b"[" * 100_000]
)
def test_damaged_notes_of_a_control(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "control.json").write_bytes(content)
    with pytest.raises(UserError, match=r"control\.json: .*: export the pipeline again"):
        control_in(tmp_path)
    (tmp_path / "control.json").write_text('{"control": {"name": "nothing"}}')
    with pytest.raises(UserError, match=r"control\.json: control.*: export the pipeline again"):
        control_in(tmp_path)
