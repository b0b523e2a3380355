"""Several models in one record, table and page."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewstep.distill.catalog.methods import origins
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.reports import compare as comparing
from fewstep.distill.reports.compare import compare
from fewstep.distill.reports.entries import kind_of, read_entry
from fewstep.distill.reports.table import by_column
from fewstep.distill.training.interrupts import run_child
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two run folders of `tiny_pipeline` as their teacher, and a pipeline of nobody's."""
    root = tmp_path_factory.mktemp("runs")
    for name, student in (("full", "full"), ("adapter", "lora")):
        run = root / name
        shutil.copytree(tiny_pipeline, run / "pipeline")
        sampling = {str(n): {"num_inference_steps": n, "guidance_scale": 1.0} for n in (1, 2)}
        (run / "pipeline" / "sampling.json").write_text(json.dumps(sampling))
        config = {
            "method": {"name": "lcd"},
            "teacher": {"path": str(tiny_pipeline)},
            "student": {"kind": student},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        training = {
            "steps": 20,
            "images": 80,
            "seconds": 61.0,
            "trained_parameters": 123456,
            "device": "1 x cpu",
        }
        (run / "exported.json").write_text(json.dumps({"step": 20, "folders": [], "training": training}))
    (root / "adapter" / "lora").mkdir()
    (root / "adapter" / "lora" / "weights").write_bytes(b"x" * 1000)
    shutil.copytree(tiny_pipeline, root / "foreign")
    return root


@pytest.fixture(scope="module")
def made(runs: Path, data_folder: Path, scored_here: None) -> tuple[Path, dict]:
    output = runs / "out"
    record = compare(
        [str(runs / "full"), str(runs / "adapter"), f"other={runs / 'foreign'}"],
        output,
        teacher_steps=[3],
        data=str(data_folder),
        num_images=8,
        seeds=2,
        device="cpu",
        options=["--batch_size", "4", "--clip", "lite0-minilm"],
        title="A <tiny> comparison",
        origins=origins(),
    )
    return output, record


def test_every_model_stands_in_the_record(made: tuple[Path, dict], tiny_pipeline: Path) -> None:
    output, record = made
    assert json.loads((output / "compare.json").read_text()) == json.loads(json.dumps(record))
    rows = [(r["model"], r["method"], r["export"], r["steps"], r["nfe"]) for r in record["rows"]]
    assert rows == [
        (f"teacher ({tiny_pipeline.parent.name})", None, "stock", 3, 6),
        ("full", "lcd", "stock", 1, 1),
        ("full", "lcd", "stock", 2, 2),
        ("adapter", "lcd, lora", "LoRA", 1, 1),
        ("adapter", "lcd, lora", "LoRA", 2, 2),
        ("other", None, "stock", 1, 2),
        ("other", None, "stock", 2, 4),
        ("other", None, "stock", 4, 8),
    ]
    by_model = {r["model"]: r for r in record["rows"]}
    assert by_model["adapter"]["bytes"] == 1000 < by_model["full"]["bytes"]
    assert by_model["full"]["training"]["seconds"] == 61 and by_model["other"]["training"] == {}
    full, adapter = (by_column(by_model[m])["KID"] for m in ("full", "adapter"))
    assert full == adapter and full.sd is not None and full.protocol.n_gen == 8
    assert by_column(by_model["full"])["image-text"].name == "image-text cosine lite0-minilm"
    assert all(r["peak_memory"]["bytes"] > 1e8 for r in record["rows"])
    assert len({r["commit"] for r in record["rows"]}) == 1


def test_pictures_share_captions_and_noise(made: tuple[Path, dict]) -> None:
    output, record = made
    assert [s["made_from"] for s in record["strips"]] == ["caption"]
    assert [c["seen"] for c in record["strips"][0]["captions"]] == [True] * 6 + [False] * 4
    files = {(p["model"], p["steps"]): output / p["file"] for p in record["strips"][0]["pictures"]}
    assert len(files) == 8
    one, same, other = (files[k] for k in (("full", 1), ("adapter", 1), ("other", 1)))
    assert Image.open(one).size == (160, 16)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def pivot(rows: list[dict[str, Any]]) -> list[list[str]]:
    """KIDs with a model a line and a number of steps a column."""
    kids = {(r["model"], r["steps"]): f"{by_column(r)['KID'].value:.4f}" for r in rows}
    models, steps = dict.fromkeys(m for m, _ in kids), (1, 2, 3, 4)
    head = ["KID-efflite0-128", "1 step", "2 steps", "3 steps", "4 steps"]
    return [head, *[[m, *[kids.get((m, n), "") for n in steps]] for m in models]]


def test_a_run_brings_its_recipe_without_places(made: tuple[Path, dict], tiny_pipeline: Path) -> None:
    """The page has it whole with the paper that it is from; where files lay on this machine it does not say."""
    output, record = made
    configs = {r["model"]: r["config"] for r in record["rows"]}
    place = {"path": tiny_pipeline.name}
    assert configs["adapter"] == {"method": {"name": "lcd"}, "teacher": place, "student": {"kind": "lora"}}
    assert configs["other"] == {}
    report = json.loads((output / "reports" / "adapter.json").read_text())
    assert report["model"]["config"] == configs["adapter"]
    html = (output / "compare.html").read_text()
    assert f"<pre>method:\n  name: lcd\nteacher:\n  path: {tiny_pipeline.name}\n" in html
    assert 'href="https://arxiv.org/abs/2311.05556"' in html and str(tiny_pipeline.parent) not in html


def test_markdown_and_page_hold_the_numbers(made: tuple[Path, dict]) -> None:
    output, record = made
    text, html = (output / "compare.md").read_text(), (output / "compare.html").read_text()
    kid = by_column(record["rows"][1])["KID"]
    number = f"{kid.value:.4f} ± {kid.sd:.4f}"
    assert number in text and number in html
    first = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n\n")[1].splitlines()]
    assert [[c.partition(" ±")[0] for c in line] for line in first if "---" not in line] == pivot(
        record["rows"]
    )
    assert text.startswith("# A &lt;tiny&gt; comparison\n") and "A &lt;tiny&gt; comparison" in html
    assert html.count("data:image/png;base64,") == 8
    assert "{{" not in html and not re.search(r"<(?!a )[^>]*\b(src|href)=[\"']?http", html)
    assert "1 min 01 s" in text and "0.12 M" in text
    assert kid.protocol.id in html
    assert record["published"] == [] and "Beside the papers" not in html


def test_a_report_of_another_protocol_is_refused(
    made: tuple[Path, dict], data_folder: Path, tmp_path: Path
) -> None:
    output, _ = made
    arguments: dict[str, Any] = {"data": str(data_folder), "num_images": 8, "seeds": 2, "teacher": "none"}
    same = output / "reports" / "full.json"
    arguments |= {"device": "cpu", "options": ["--batch_size", "4", "--clip", "lite0-minilm"]}
    record = compare([f"before={same}", f"now={output.parent / 'full'}"], tmp_path / "a", **arguments)
    assert [r["model"] for r in record["rows"]] == ["before", "before", "now", "now"]
    assert {p["model"] for p in record["strips"][0]["pictures"]} == {"now"}
    arguments["num_images"] = 7
    with pytest.raises(UserError, match=r"not comparable, n_gen differs: 8 and 7"):
        compare([f"before={same}", f"now={output.parent / 'full'}"], tmp_path / "b", **arguments)
    assert not (tmp_path / "b" / "compare.html").exists()


def test_what_cannot_be_compared(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "run_child", run_child)  # whose words come through
    full = str(runs / "full")
    cut = shutil.copytree(runs / "foreign", tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for entries, flags, message in (
        ([full, full], [], "full: two entries have this name; give one as NAME=PATH"),
        ([full], ["--steps", "4"], "offers 1, 2; add one of them to --steps"),
        (
            [str(cut)],
            ["--teacher", "none", "--data", "emoji", "--num_images", "4"],
            "cut could not be scored",
        ),
        ([b"a\xff".decode(errors="surrogateescape")], [], "is not UTF-8 text"),
    ):
        output = str(tmp_path / "out")
        assert main(["compare", *entries, "--output", output, "--teacher_steps", "1", *flags]) == 2
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith("fewstep: error: ") and message in last
    shutil.copytree(full, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "pipeline")
    with pytest.raises(UserError, match="holds no pipeline to score"):
        read_entry(str(tmp_path / "unfinished"))


def test_kinds_of_export(runs: Path, tmp_path: Path) -> None:
    assert kind_of(runs / "foreign") == "stock"
    index = json.loads((runs / "foreign" / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    for change, kind in (
        ({"_class_name": ["pipeline_own", "Own"]}, "remote code"),
        ({"scheduler": ["own_scheduler", "Own"]}, "remote code"),
        (checker, "stock"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "own_scheduler.py").touch()
        assert kind_of(tmp_path) == kind


def test_entries_by_name_and_path(runs: Path, tmp_path: Path, made: tuple[Path, dict]) -> None:
    odd = tmp_path / "lr=1e-4"
    shutil.copytree(runs / "full", odd)
    assert (read_entry(str(odd)).name, read_entry(f"a={odd}").name) == ("lr=1e-4", "a")
    assert read_entry(f"a={odd}").pipeline == str(odd / "pipeline")
    output, _ = made
    with pytest.raises(
        UserError, match=r"compare\.json: device: field required: give the file that evaluate wrote"
    ):
        compare([str(output / "compare.json")], tmp_path / "out", teacher="none")
    with pytest.raises(UserError, match="a-b: two entries have this name"):
        compare([f"a b={odd}", f"a-b={odd}"], tmp_path / "out", teacher="none")


def test_a_report_may_stand_for_the_teacher(
    made: tuple[Path, dict], data_folder: Path, tmp_path: Path
) -> None:
    output, _ = made
    reports = output / "reports"
    teacher = next(p for p in reports.iterdir() if p.name.startswith("teacher"))
    record = compare(
        [str(reports / "full.json")],
        tmp_path / "out",
        teacher=str(teacher),
        data=str(data_folder),
        num_images=8,
    )
    before = made[1]["rows"]
    kept = [r for r in before if r["model"] in (before[0]["model"], "full")]
    assert record["rows"] == [{**r, "measured": "before"} for r in kept]
    assert record["strips"] == []


def test_pictures_are_those_of_the_scored_calls(
    runs: Path, data_folder: Path, tmp_path: Path, scored_here: None
) -> None:
    arguments: dict[str, Any] = {"data": str(data_folder), "num_images": 4, "seeds": 1, "teacher": "none"}
    arguments |= {"steps": [1], "device": "cpu"}
    for scale in ("1.0", "8.0"):
        compare([str(runs / "foreign")], tmp_path / scale, options=["--guidance_scale", scale], **arguments)
    one, other = (tmp_path / s / "pictures" / "foreign-1.png" for s in ("1.0", "8.0"))
    assert one.read_bytes() != other.read_bytes()
