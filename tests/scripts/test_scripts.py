"""The wrappers in scripts/ call verbs that the command line knows, and install what they say."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
CONSTRAINTS = SCRIPTS / "constraints.txt"


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


def constraints() -> dict[str, str]:
    lines = [x for x in CONSTRAINTS.read_text().splitlines() if not x.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_the_tested_set_fits_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested, found = constraints(), set()
    for text in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        wanted = Requirement(text)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in tested:
            assert wanted.specifier.contains(tested[name]), f"{text}: the tested set has {tested[name]}"
            found.add(name)
    assert found >= {"torch", "torchvision", "triton", "numpy", "diffusers", "transformers", "mypy"}


def installs(folder: Path, constraints: Path | str) -> list[str]:
    """The arguments of each pip call that scripts/_venv.sh makes for an environment in `folder`."""
    calls = folder / "calls"
    calls.write_text("")
    for name in ("pip", "python"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
        (folder / "bin" / name).chmod(0o755)
    subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source {SCRIPTS}/_venv.sh; ensure_venv "[test]"'],
        env={**os.environ, "FEWSTEP_VENV": str(folder), "FEWSTEP_CONSTRAINTS": str(constraints)},
        check=True,
        capture_output=True,
    )
    return calls.read_text().splitlines()


def test_constraints_are_installed_when_asked_for_and_anew_when_they_change(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("torch==2.14.1\n")
    project = f"-e {ROOT}[test]"
    free = installs(tmp_path, "")
    assert free[0].endswith(project) and "--constraint" not in free[0] and len(free) == 2
    assert f"--constraint {pinned} {project}" in installs(tmp_path, pinned)[0]
    assert installs(tmp_path, pinned) == []
    pinned.write_text("torch==2.15.0\n")
    assert len(installs(tmp_path, pinned)) == 2
    with pytest.raises(subprocess.CalledProcessError) as refused:
        installs(tmp_path, tmp_path / "missing.txt")
    assert b"missing.txt is no readable file" in refused.value.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_an_installation_is_one_line_and_a_log_of_which_a_failure_shows_the_end(
    fails: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\nseq 100 | sed 's/^/line /'\necho broken wheel >&2\nexit {int(fails)}\n")
        file.chmod(0o755)
    child = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {SCRIPTS}/_venv.sh; ensure_venv; echo installed"],
        env={**os.environ, "FEWSTEP_VENV": str(tmp_path), "FEWSTEP_CONSTRAINTS": ""},
        capture_output=True,
        text=True,
    )
    log, said = tmp_path / "install.log", child.stderr.splitlines()
    assert str(log) in said[0] and "line 1\n" in log.read_text() and "broken wheel" in log.read_text()
    if fails:
        assert (child.returncode, child.stdout) == (1, "")
        assert "line 100" in said and "broken wheel" in said and "line 50" not in said
        assert str(log) in said[-1]
    else:
        assert (child.returncode, child.stdout, len(said)) == (0, "installed\n", 1)


def test_continuous_integration_installs_the_tested_set(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    test = tmp_path / "scripts" / "test"
    test.write_text('#!/bin/sh\necho "$FEWSTEP_CONSTRAINTS $@"\n')
    test.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "FEWSTEP_CONSTRAINTS"}
    for given, expected in ({}, f"{tmp_path}/scripts/constraints.txt"), ({"FEWSTEP_CONSTRAINTS": ""}, ""):
        child = subprocess.run(
            ["bash", str(tmp_path / ".ci" / "run"), "--slow"], env={**environment, **given},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert child.stdout == f"{expected} --slow\n"
