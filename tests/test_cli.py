"""The verbs of the command line."""

import json
import shutil

import pytest
from fewstep.distill.cli import main


def test_evaluate_prints_a_table_and_writes_the_report(tiny_pipeline, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_pipeline, folder)
    output = tmp_path / "report.json"
    flags = [
        "--data",
        "emoji",
        "--num_images",
        "4",
        "--batch_size",
        "4",
        "--steps",
        "1",
        "2",
        "--output",
        str(output),
    ]
    assert main(["evaluate", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert [row["steps"] for row in report["rows"]] == [1, 2]
    value = next(s["value"] for s in report["rows"][0]["scores"] if s["protocol"]["metric"] == "KID")
    assert f"{value:.4f}" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distil"], "no command 'distil'"),
        (["evaluate", "x", "--num_images", "many"], "--num_images: invalid int value: 'many'"),
        (["evaluate", "no/such/folder", "--steps", "1"], "no/such/folder"),
        (["distill"], "which configuration?"),
        (["distill", "no.yaml"], "no configuration no.yaml"),
        (["demo", "--config", "no.yaml"], "no configuration no.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("fewstep: error: ")
    assert said in captured.err


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"fewstep {verb} " in printed for verb in ("distill", "evaluate", "train-teacher", "demo"))
