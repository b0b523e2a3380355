"""The wrappers in scripts/ call verbs that the command line knows."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("name", ["distill", "evaluate", "train_teacher"])
def test_wrapper_prints_the_usage_of_its_verb(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr()
    assert stopped.value.code == 0, output.err
    assert f"fewstep {name.replace('_', '-')}" in output.out
