"""The page's steps to add a method, as they stand there: copy, list, train two steps, open what was exported."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import fewstep.distill.methods
import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog import methods as catalog
from fewstep.distill.cli import main
from fewstep.distill.settings import StudentSettings

ROOT = Path(__file__).resolve().parents[2]
STEPS = (ROOT / "distill" / "methods" / "README.md").read_text().split("\n## How to add a method\n")[1]


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", STEPS, re.DOTALL)[number]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files that the steps touch, after the first two steps; the process imports the new method from there."""
    for place in ("distill/methods/skeleton", "tests/methods", "configs/emoji"):
        (tmp_path / place).mkdir(parents=True)
    files = [*(ROOT / "distill/methods/skeleton").glob("*.*"), ROOT / "tests/methods/test_skeleton.py"]
    for file in files:
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    subprocess.run(["bash", "-e", "-c", block("bash")], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        fewstep.distill.methods,
        "__path__",
        [*fewstep.distill.methods.__path__, str(tmp_path / "distill" / "methods")],
    )
    monkeypatch.setitem(catalog.METHODS, "my_method", listed())
    yield tmp_path


def listed() -> catalog.Entry:
    """The new entry, of the catalog with the page's two lines in their places."""
    imported, entry = block("python").split("\n\n")
    source = (ROOT / "distill/catalog/methods.py").read_text()
    edited = source.replace("\nfrom ..methods.restoration", f"\n{imported}\nfrom ..methods.restoration", 1)
    edited = edited.replace("METHODS = {\n", f"METHODS = {{\n{entry}", 1)
    assert edited.count("MyMethodSettings") == 2
    spec = importlib.util.find_spec(catalog.__name__)
    assert spec
    again = importlib.util.module_from_spec(spec)
    exec(compile(edited, "methods.py", "exec"), vars(again))
    return vars(again)["METHODS"]["my_method"]


def test_the_steps_of_the_page_give_a_method_that_trains_and_exports(
    clone: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewstep_, *arguments = shlex.split(block("bash", 1))
    assert fewstep_ == "fewstep" and main([*arguments, "--teacher.path", str(tiny_pipeline)]) == 0
    run = clone / "runs" / "my_method"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log][-1] == 2
    call = json.loads((run / "pipeline" / "sampling.json").read_text())["1"]
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    image = pipeline("red cat", **call, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)
    assert main([*arguments, "--teacher.path", str(tiny_pipeline)]) == 0
    assert "finished" in capsys.readouterr().out


def test_the_copied_test_tests_the_copy(clone: Path, tiny_pipeline: Path) -> None:
    file = clone / "tests" / "methods" / "test_my_method.py"
    spec = importlib.util.spec_from_file_location("test_my_method", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MyMethod.__module__ == "fewstep.distill.methods.my_method.my_method"
    module.test_the_gradient_is_that_of_a_constant_target(StudentSettings(), tiny_pipeline)


def test_the_line_of_the_packages_fits_the_list() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    edited = text.replace("packages = [\n", f"packages = [\n{block('toml')}", 1)
    packages = tomllib.loads(edited)["tool"]["setuptools"]["packages"]
    assert packages[0] == "fewstep.distill.methods.my_method" and packages.count(packages[0]) == 1
