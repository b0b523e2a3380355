"""Without --data the reference is what the pipeline was trained on, or nothing is scored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.protocol import Score
from fewstep.distill.reports.compare import compare
from fewstep.distill.reports.report import read_report
from fewstep.distill.reports.trained_on import Data, data_for, default_holdout, read_data, trained_on
from fewstep.distill.teachers import EMBEDDED


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(data_folder: Path, tmp_path: Path) -> Path:
    """Captioned pictures without splits."""
    return Path(shutil.copytree(data_folder / "train", tmp_path / "photos"))


def run_on(folder: Path, tiny_pipeline: Path, data: Any, **changes: Any) -> Path:
    """The pipeline in a run folder that was trained on `data`."""
    shutil.copytree(tiny_pipeline, folder / "pipeline")
    (folder / "pipeline" / "sampling.json").write_text('{"default": {}}')
    tree = {"method": {"name": "lcd"}, "teacher": {"path": "emoji-sd"}, "data": data, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "pipeline"


def test_a_run_is_scored_on_its_own_data(
    tiny_pipeline: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a split of unseen pictures there is no hold-out, and a line says so; one that is named must be there."""
    pipeline = run_on(tmp_path / "run", tiny_pipeline, {"name": str(photos)})
    out = tmp_path / "report.json"
    call = ["evaluate", str(pipeline), "--steps", "1", "--num_images", "4", "--device", "cpu"]
    assert main([*call, "--output", str(out)]) == 0
    assert f"fewstep: {photos}: has no split of unseen pictures" in capsys.readouterr().err
    report = read_report(out)
    scores = [Score.from_json(s) for s in report["rows"][0]["scores"]]
    assert {s.protocol.reference for s in scores} == {"photos/train"} and report["data"] == "photos"
    assert [s.protocol.metric for s in scores] == ["KID", "FD", "caption match"]
    assert main([*call, "--holdout", "holdout"]) == 2
    assert "has no split 'holdout'" in capsys.readouterr().err
    made = ["sample", str(pipeline), "--steps", "1", "--num_images", "3", "--output", str(tmp_path / "made")]
    assert main(made) == 0
    told = [
        json.loads(line)["text"] for line in (tmp_path / "made" / "metadata.jsonl").read_text().splitlines()
    ]
    assert set(told) <= {"cat", "dog", "red", "red cat", "red dog", "cat dog"}


def test_of_a_foreign_pipeline_the_data_must_be_given(
    tiny_pipeline: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = str(shutil.copytree(tiny_pipeline, tmp_path / "foreign"))
    made = run_on(tmp_path / "made", tiny_pipeline, {"name": "teacher", "prompts": "prompts.txt"})
    out = str(tmp_path / "out")
    for place in (foreign, str(made), str(photos), "somebody/model"):
        for call in (
            ["evaluate", place, "--steps", "1"],
            ["sample", place, "--steps", "1", "--output", out],
            ["compare", place, "--output", out, "--teacher", "none"],
        ):
            assert main(call) == 2
            line = capsys.readouterr().err
            assert line.startswith("fewstep: error: data: nothing says what ") and line.count("\n") == 1
            assert place in line and line.endswith("give --data NAME_OR_FOLDER\n")
    assert not Path(out).exists()


def test_what_a_folder_was_trained_on(tiny_pipeline: Path, tmp_path: Path) -> None:
    assert trained_on("emoji-sd") == trained_on(str(EMBEDDED["emoji-sd"])) == Data("emoji")
    assert trained_on("fashion-edm") == Data("fashion-mnist")
    assert trained_on("somebody/model") is None
    with pytest.raises(UserError, match="no such folder"):
        trained_on(str(tmp_path / "nowhere"))
    whole = {"name": "photos", "split": "score", "caption_column": None, "image_column": "image"}
    pipeline = run_on(tmp_path / "a", tiny_pipeline, {**whole, "center_crop": False, "random_flip": True})
    expected = Data("photos", "score", {"caption_column": None, "center_crop": False})
    assert trained_on(str(pipeline)) == trained_on(f"{pipeline}+style.safetensors") == expected
    assert read_data(str(expected)) == Data("photos", "train", expected.options)
    search = {"name": "emoji", "split": "reward"}
    for i, (report, data) in enumerate(
        (({"split": "score"}, Data("emoji", "score")), ({"name": "x"}, Data("x")), (None, Data("emoji")))
    ):
        changes = {"method": {"name": "q_sched"}, "report": report}
        assert trained_on(str(run_on(tmp_path / f"{i}", tiny_pipeline, search, **changes))) == data
    for i, data in enumerate((None, "emoji", {"split": "train"}, {"name": 3})):
        with pytest.raises(UserError, match=r"config\.yaml: data: ") as caught:
            trained_on(str(run_on(tmp_path / f"bad{i}", tiny_pipeline, data)))
        assert "\n" not in str(caught.value)


def test_data_are_a_name_or_a_name_with_options() -> None:
    assert read_data("emoji") == Data("emoji") and str(Data("emoji")) == "emoji"
    assert read_data("{a,b}.tar") == Data("{a,b}.tar") and read_data("{a,b}") == Data("{a,b}")
    assert read_data("{name: photos, caption_column: label}") == Data(
        "photos", "train", {"caption_column": "label"}
    )
    for text, message in (("{name: a, colum: b}", "data.colum: no such key"), ("{name: 3}", "data: name: ")):
        with pytest.raises(UserError, match=message):
            read_data(text)


def test_a_holdout_that_is_not_there_is_told_from_one_that_is_broken(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default_holdout(Data(str(data_folder)), "train") == "holdout"
    assert default_holdout(Data(str(data_folder / "train")), "train") is None
    assert default_holdout(Data("emoji"), "holdout") is None
    broken = shutil.copytree(data_folder, tmp_path / "broken")
    (broken / "holdout" / "metadata.jsonl").write_text("{")
    assert default_holdout(Data(str(broken)), "train") == "holdout"
    assert main(["evaluate", str(data_folder / "train"), "--data", str(broken), "--num_images", "4"]) == 2
    assert "holdout/metadata.jsonl: line 1: is not JSON" in capsys.readouterr().err


def test_models_of_different_data_are_not_compared_unasked(
    tiny_pipeline: Path, photos: Path, tmp_path: Path
) -> None:
    runs = [
        str(run_on(tmp_path / name, tiny_pipeline, data).parent)
        for name, data in (("a", {"name": str(photos)}), ("b", {"name": str(photos), "split": "score"}))
    ]
    with pytest.raises(
        UserError, match=r"different data \(.*, split train and .*, split score\); choose with --data"
    ):
        compare(runs, tmp_path / "out", teacher="none")
    assert data_for([f"{runs[0]}/pipeline", str(tiny_pipeline)]) == Data(str(photos))
    assert data_for([str(tiny_pipeline)], "emoji-sd") == Data("emoji")
    assert not (tmp_path / "out").exists()
