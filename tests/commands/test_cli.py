"""The verbs of the command line."""

import errno
import json
import shutil

import pytest
from fewstep.distill.cli import VERBS, main


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
        (
            ["evaluate", "x", "--num_images", "many"],
            "--num_images: 'many' is no whole number; give 1 to 1000000",
        ),
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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("odd\nmore"), 1, "ValueError: odd (this is a fault of fewstep or of a library; --traceback shows"),
        (RecursionError(), 1, "RecursionError: (this is a fault"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 2,
         "a.png: cannot be read or written (No space left on device); free space, or write elsewhere"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), 2, "runs: cannot be read or written (Is a dir"),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_any_error_is_one_line_and_traceback_shows_it(
    error: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []

    def verb(arguments: list[str]) -> int:
        seen.append(arguments)
        raise error

    monkeypatch.setitem(VERBS, "demo", verb)
    assert main(["demo", "--seed", "1"]) == code
    written = capsys.readouterr().err
    assert written.startswith(f"fewstep: error: {line}" if line else "") and written.count("\n") == bool(line)
    if code != 130:
        with pytest.raises(type(error)):
            main(["demo", "--traceback", "--seed", "1"])
        assert seen == [["--seed", "1"]] * 2


def test_a_flag_is_not_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    """--seed is a key of the configuration, not --seeds."""
    assert main(["demo", "--seed", "x"]) == 2
    assert "error: seed: 'x'" in capsys.readouterr().err
