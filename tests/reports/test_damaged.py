"""Damaged run folders and reports: `compare` says in one line which file it is, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.reports.entries import offered, read_entry
from fewstep.distill.reports.report import read_report

from ..metrics.test_protocol import score

INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
CALLS = {"1": {"num_inference_steps": 1, "guidance_scale": 1.0}}
TRAINING = {"steps": 20, "images": 80, "seconds": 61.5, "trained_parameters": 123, "device": "1 x cpu"}
ROW = {
    "steps": 1,
    "nfe": 1,
    "seeds": 1,
    "seconds_per_image": 0.5,
    "peak_memory": {"bytes": None, "measure": "none"},
    "arguments": CALLS["1"],
    "scores": [score().to_json(), score(metric="FD").to_json()],
}
REPORT = {
    "pipeline_sha256": "ab",
    "device": "cpu: x",
    "versions": {"torch": "2"},
    "commit": "unknown",
    "batch_size": 4,
    "rows": [ROW],
    "model": {"name": "mine", "method": "lcd", "export": "stock", "training": TRAINING, "bytes": 5},
}
FILES: dict[str, Any] = {
    "run/config.yaml": {
        "method": {"name": "lcd"},
        "student": {"kind": "full"},
        "teacher": {"path": "emoji-sd"},
    },
    "run/exported.json": {"step": 20, "folders": ["pipeline"], "training": TRAINING},
    "run/pipeline/model_index.json": INDEX,
    "run/pipeline/sampling.json": CALLS,
    "report.json": REPORT,
}


def dump(name: str, value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True) if name.endswith("yaml") else json.dumps(value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for name, value in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(dump(name, value))
    return root


def instead(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "a folder": folder,
    "empty": instead(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "not UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b":", b'"\xff":', 1)),
    "NUL": instead(b"\0" * 40),
    "null": instead(b"null"),
    "a list": instead(b"[1, 2]"),
    "text": instead(b'"text"'),
    "no number": instead(b"NaN"),
    "deep": instead(b"[" * 100_000),
    "no keys": instead(b"{}"),
}
NOT_READ = {("run/exported.json", "missing")}  # a run that was never exported has none


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_one_line(
    name: str, kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name, kind) in NOT_READ:
        assert read_entry(str(whole / "run")).training == TRAINING
        return
    path = shutil.copytree(whole, tmp_path / "copy") / name
    BROKEN[kind](path)
    refused(path, tmp_path, capsys)


def refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of `compare` on the run or report of a damaged `path`, which it names."""
    root = tmp_path / "copy"
    entry = root / ("report.json" if path.name == "report.json" else "run")
    flags = ["--output", str(tmp_path / "out"), "--teacher", "none", "--steps", "1"]
    assert main(["compare", str(entry), *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fewstep: error: ") and shown.count("\n") == 1, shown
    place = path.parent if path.name == "model_index.json" and not path.exists() else path
    assert str(place).removesuffix("/pipeline") in shown, shown
    assert any(word in shown for word in ("restore it", "again", "exports again", "finish the run")), shown
    assert not (tmp_path / "out").exists()
    return shown


def changed(tree: Any, place: str, value: Any) -> Any:
    """A copy with one value replaced, or left out where it is `...`."""
    out = json.loads(json.dumps(tree))
    node, *parts = out, *place.split(".")
    for part in parts[:-1]:
        node = node[int(part) if isinstance(node, list) else part]
    last = int(parts[-1]) if isinstance(node, list) else parts[-1]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return out


NAN = float("nan")
VALUES = [
    ("run/config.yaml", "method", "lcd"),
    ("run/config.yaml", "method", {}),
    ("run/config.yaml", "method.name", 3),
    ("run/config.yaml", "teacher", "emoji-sd"),
    ("run/config.yaml", "teacher.path", ["emoji-sd"]),
    ("run/config.yaml", "student", [1]),
    ("run/config.yaml", "student.kind", 1),
    ("run/exported.json", "step", -1),
    ("run/exported.json", "step", "many"),
    ("run/exported.json", "folders", "pipeline"),
    ("run/exported.json", "training", ...),
    ("run/exported.json", "training", [1]),
    ("run/exported.json", "training.seconds", NAN),
    ("run/exported.json", "training.seconds", -3),
    ("run/exported.json", "training.steps", "x"),
    ("run/exported.json", "training.trained_parameters", {}),
    ("run/exported.json", "training.device", "\ud800"),
    ("run/pipeline/model_index.json", "_class_name", ...),
    ("run/pipeline/model_index.json", "_class_name", []),
    ("run/pipeline/model_index.json", "_class_name", ["a"]),
    ("run/pipeline/model_index.json", "_class_name", [1, 2]),
    ("run/pipeline/model_index.json", "_class_name", None),
    ("run/pipeline/sampling.json", "1", 4),
    ("run/pipeline/sampling.json", "1.guidance_scale", NAN),
    ("run/pipeline/sampling.json", "1.guidance_scale", float("inf")),
    ("run/pipeline/sampling.json", "-1", {}),
    ("run/pipeline/sampling.json", "one", {}),
    ("report.json", "device", 5),
    ("report.json", "versions", ["torch"]),
    ("report.json", "versions.torch", 2),
    ("report.json", "batch_size", 0),
    ("report.json", "commit", 1234),
    ("report.json", "verified", ["x"]),
    ("report.json", "rows", []),
    ("report.json", "rows", ...),
    ("report.json", "rows.0", None),
    ("report.json", "rows.0.steps", -1),
    ("report.json", "rows.0.steps", ...),
    ("report.json", "rows.0.nfe", "x"),
    ("report.json", "rows.0.seeds", 0),
    ("report.json", "rows.0.seconds_per_image", NAN),
    ("report.json", "rows.0.seconds_per_image", "fast"),
    ("report.json", "rows.0.peak_memory", ...),
    ("report.json", "rows.0.peak_memory.bytes", -1),
    ("report.json", "rows.0.arguments", None),
    ("report.json", "rows.0.arguments.guidance_scale", NAN),
    ("report.json", "rows.0.scores", []),
    ("report.json", "rows.0.scores", [score().to_json()]),  # no FD
    ("report.json", "rows.0.scores.0.name", 1),
    ("report.json", "rows.0.scores.0.value", NAN),
    ("report.json", "rows.0.scores.0.value", None),
    ("report.json", "rows.0.scores.0.sd", "x"),
    ("report.json", "rows.0.scores.0.interval", [1]),
    ("report.json", "rows.0.scores.0.values", [NAN]),
    ("report.json", "rows.0.scores.0.protocol_id", "another"),
    ("report.json", "rows.0.scores.0.protocol.n_gen", 7),
    ("report.json", "rows.0.scores.0.protocol.n_gen", ...),
    ("report.json", "rows.0.scores.0.protocol.unknown", 7),
    ("report.json", "rows.0.scores.0", score(image_size="x").to_json()),  # the id fits
    ("report.json", "model.name", ...),
    ("report.json", "model.method", ["lcd"]),
    ("report.json", "model.training.seconds", "long"),
    ("report.json", "model.bytes", -5),
    ("report.json", "model", "mine"),
]


@pytest.mark.parametrize(("name", "place", "value"), VALUES)
def test_a_value_that_does_not_fit_is_one_line(
    name: str, place: str, value: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(whole, tmp_path / "copy") / name
    path.write_text(dump(name, changed(FILES[name], place, value)))
    refused(path, tmp_path, capsys)


def test_yaml_that_refers_to_itself(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(whole, tmp_path / "copy") / "run/config.yaml"
    for text in ("method: &m {name: lcd, more: *m}", "&a [*a]", "method: {name: a}\nmethod: {name: b}"):
        path.write_text(text)
        assert "config.yaml: is not readable YAML" in refused(path, tmp_path, capsys)


def test_what_is_whole_is_read(whole: Path) -> None:
    run, report = read_entry(str(whole / "run")), read_entry(f"other={whole / 'report.json'}")
    assert (run.name, run.method, run.export, run.teacher) == ("run", "lcd", "stock", "emoji-sd")
    assert (report.name, report.method, report.export, report.bytes) == ("other", "lcd", "stock", 5)
    assert run.training == report.training == TRAINING and offered(run, [1, 2]) == [1]
    assert read_report(whole / "report.json") == json.loads(json.dumps(REPORT))
    named = Path(__file__).parents[2].glob("configs/*/results/**/*.json")
    reports = [p for p in named if "scores" in p.read_text() and "rows" in json.loads(p.read_text())]
    assert len(reports) > 20
    for path in reports:
        assert read_report(path) == json.loads(path.read_text())


def test_places_that_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    for place in (tmp_path / "file.txt", tmp_path / "none", tmp_path / "none+style.safetensors"):
        with pytest.raises(UserError, match=r"is no folder; give a run folder, a pipeline folder"):
            read_entry(str(place))
    entry = read_entry("someone/model+someone/style/file.safetensors")
    assert entry == replace(entry, pipeline="someone/model+someone/style/file.safetensors", export=None)
