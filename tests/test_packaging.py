"""A plain install: what the wheel holds, and that it works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("distill", "kernels", "pipelines")
DATA = (
    "distill/data/emoji",
    "distill/scorers/heads",
    "distill/teachers/emoji_sd",
    "distill/teachers/fashion_edm",
)
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """stdout of `python ARGUMENTS` started in `cwd`."""
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from, so that the build leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", out, source, cwd=out)
    (path,) = out.glob("fewstep-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_every_folder_with_modules_is_a_listed_package() -> None:
    found = {
        ".".join(("fewstep", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.is_relative_to(ROOT / data) for data in DATA)
    }
    assert set(SETTINGS["packages"]) == found


def test_wheel_holds_every_module_and_all_data_and_one_import_name(wheel: Path) -> None:
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    data = [path for folder in DATA for path in (ROOT / folder).rglob("*") if path.is_file()]
    data += [ROOT / "distill" / "reports" / f"page.{kind}" for kind in ("css", "html", "js")]
    expected = {f"fewstep/{path.relative_to(ROOT).as_posix()}" for path in modules + data}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {
        f"fewstep/distill/data/emoji/{name}" for name in ("noto.png", "twemoji.png", "metadata.jsonl")
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_names_no_folder_of_the_machine_that_built_it(wheel: Path, source: Path) -> None:
    places = b"|".join(re.escape(str(place).encode()) for place in (ROOT, source))
    place_alone = re.compile(rb"(?<![\w.-])(" + places + rb")(?![\w.-])")
    with zipfile.ZipFile(wheel) as archive:
        leaks = [name for name in archive.namelist() if place_alone.search(archive.read(name))]
    assert leaks == []


def test_plain_install_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    """Started with -S and explicit folders: no .pth file runs, so an editable install has no say."""
    program = f"""
import importlib, importlib.metadata, importlib.resources, sys
for name in {SETTINGS["packages"]!r}:
    print(importlib.import_module(name).__file__)
(command,) = importlib.metadata.entry_points(group="console_scripts", name="fewstep")
print(sys.modules[command.load().__module__].__file__)
emoji = importlib.resources.files("fewstep.distill.data") / "emoji"
assert (emoji / "noto.png").read_bytes().startswith(b"\\x89PNG")
assert not any("__editable__" in entry for entry in sys.path)
"""
    libraries = [entry for entry in sys.path if Path(entry).is_dir() and Path(entry).resolve() != ROOT]
    path = os.pathsep.join([str(installed), *libraries])
    files = run("-S", "-c", program, cwd=tmp_path, PYTHONPATH=path).split()
    assert len(files) == len(SETTINGS["packages"]) + 1
    assert all(Path(file).is_relative_to(installed) for file in files), files
