"""A plain install: what the wheel holds, and that it works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "distill", "kernels", "pipelines")
DATA = (
    "distill/data/emoji",
    "distill/scorers/heads",
    "distill/teachers/emoji_sd",
    "distill/teachers/fashion_edm",
)
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))
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


def name_of(file: Path) -> str:
    """Where a file of the repository stands in an installation: distill/package is `fewstep` itself."""
    return "fewstep/" + file.relative_to(ROOT).as_posix().removeprefix("distill/package/")


def test_every_folder_with_modules_is_a_listed_package() -> None:
    found = {
        name_of(path).rpartition("/")[0].replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.is_relative_to(ROOT / data) for data in DATA)
    }
    assert set(SETTINGS["packages"]) == found | {"fewstep.configs"}


def test_wheel_holds_every_module_and_recipe_and_all_data_and_one_import_name(wheel: Path) -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files += [path for folder in DATA for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [ROOT / "distill" / "reports" / f"page.{kind}" for kind in ("css", "html", "js")]
    files += [ROOT / "distill" / "package" / "py.typed", *RECIPES]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == set(map(name_of, files))
    assert {
        "fewstep/__main__.py",
        "fewstep/configs/emoji/lcd.yaml",
        "fewstep/distill/data/emoji/noto.png",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_what_the_wheel_is_built_from(source: Path, tmp_path: Path) -> None:
    build = (
        f"import os, setuptools.build_meta as m; os.chdir({str(source)!r}); m.build_sdist({str(tmp_path)!r})"
    )
    run("-c", build, cwd=tmp_path)
    (archive,) = tmp_path.glob("fewstep-*.tar.gz")
    with tarfile.open(archive) as members:
        held = {name.partition("/")[2] for name in members.getnames()}
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    data = [path for folder in DATA for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in (*RECIPES, *modules, *data)}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE", "distill/package/py.typed"} <= held


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
    print(list(importlib.import_module(name).__path__)[0])
(command,) = importlib.metadata.entry_points(group="console_scripts", name="fewstep")
print(sys.modules[command.load().__module__].__file__)
emoji = importlib.resources.files("fewstep.distill.data") / "emoji"
assert (emoji / "noto.png").read_bytes().startswith(b"\\x89PNG")
assert not any("__editable__" in entry for entry in sys.path)
"""
    path = path_of(installed)
    files = run("-S", "-c", program, cwd=tmp_path, PYTHONPATH=path).split()
    assert len(files) == len(SETTINGS["packages"]) + 1
    assert all(Path(file).is_relative_to(installed) for file in files), files


def path_of(installed: Path) -> str:
    """PYTHONPATH of the installation and of the libraries here, without the repository."""
    libraries = [entry for entry in sys.path if Path(entry).is_dir() and Path(entry).resolve() != ROOT]
    return os.pathsep.join([str(installed), *libraries])


def test_the_commands_that_need_no_torch_run_from_the_wheel_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    fewstep = ("-S", "-m", "fewstep")
    path = path_of(installed)
    listed = run(*fewstep, "recipes", cwd=tmp_path, PYTHONPATH=path)
    assert "\nemoji/lcd " in listed and len(listed.splitlines()) == len(
        RECIPES
    )  # a head, but none of a script's
    shown = run(*fewstep, "recipes", "show", "emoji/lcd", cwd=tmp_path, PYTHONPATH=path)
    assert shown == (ROOT / "configs" / "emoji" / "lcd.yaml").read_text()
    program = "import fewstep; print(fewstep.__version__, len(fewstep.methods()), len(fewstep.recipes()))"
    version, methods, recipes = run("-S", "-c", program, cwd=tmp_path, PYTHONPATH=path).split()
    assert f"fewstep-{version}.dist-info" in os.listdir(installed)
    assert int(methods) > 10 and int(recipes) == len(RECIPES) - 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # two processes that import torch, and 1 min of pictures
def test_dry_run_and_demo_run_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": path_of(installed),
        "FEWSTEP_CACHE": str(tmp_path / "cache"),
        "ACCELERATE_USE_CPU": "1",
    }
    place = tmp_path / "place"
    place.mkdir()
    plan = run("-S", "-m", "fewstep", "distill", "emoji/lcd", "--dry_run", cwd=place, **environment)
    assert "emoji-sd" in plan and list(place.iterdir()) == []
    short = ["--max_train_steps", "2", "--train_batch_size", "2", "--num_images", "8", "--seeds", "1"]
    table = run("-S", "-m", "fewstep", "demo", *short, cwd=place, **environment)
    assert table.count("\n| student |") == 3 and table.count("\n| teacher |") == 4
    assert (place / "runs" / "demo" / "student" / "pipeline" / "model_index.json").is_file()
    assert (place / "runs" / "demo" / "pictures.png").is_file()
