"""The Hub's `kernels` package and our folder of that name, seen from the repository root."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HUB_KERNELS_INSTALLED = any(importlib.metadata.distributions(name="kernels"))


def run_at_root(*arguments: str, path: tuple[Path, ...] = ()) -> str:
    """stdout of `python ARGUMENTS` started in the repository root, which then comes first on sys.path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A site folder holding a distribution `kernels` 9.9: a package, a submodule and metadata."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("from .layer import get_kernel\n")
    (site / "kernels" / "layer.py").write_text("def get_kernel():\n    return 'the installed one'\n")
    (site / "kernels-9.9.dist-info").mkdir()
    (site / "kernels-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n"
    )
    (site / "kernels-9.9.dist-info" / "top_level.txt").write_text("kernels\n")
    return site


USE_INSTALLED = """
import importlib.util, kernels, kernels.layer
from kernels import get_kernel
assert get_kernel() == kernels.layer.get_kernel() == "the installed one"
print(kernels.__file__, importlib.util.find_spec("kernels").origin, sep="\\n")
"""


def test_the_installed_package_takes_the_place_of_the_folder(stand_in: Path) -> None:
    expected = [str(stand_in / "kernels" / "__init__.py")] * 2
    assert run_at_root("-c", USE_INSTALLED, path=(stand_in,)).split() == expected


def test_the_installed_package_is_found_behind_two_clones(stand_in: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "kernels", clone / "kernels")
    output = run_at_root("-c", USE_INSTALLED, path=(clone, ROOT, stand_in))
    assert output.split() == [str(stand_in / "kernels" / "__init__.py")] * 2


def test_pytest_started_at_the_root_gives_tests_the_installed_package(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "test_probe.py").write_text(f"def test_probe():\n    exec({USE_INSTALLED!r})\n")
    pytest_arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_probe.py"))
    for mode in ("importlib", "prepend"):
        output = run_at_root(*pytest_arguments, f"--import-mode={mode}", path=(stand_in,))
        assert "1 passed" in output


PROBES = """
import inspect
from diffusers.utils import is_kernels_available, is_kernels_version
from transformers.utils.import_utils import is_kernels_available as transformers_sees
bounds = ("9", "10")[: len(inspect.signature(transformers_sees).parameters)]  # older ones have no upper bound
print(transformers_sees(*bounds), transformers_sees("99"))
print(is_kernels_available(), is_kernels_version("==", "9.9"))
"""


@pytest.mark.skipif(HUB_KERNELS_INSTALLED, reason="the Hub's kernels package is installed here")
def test_without_the_installed_package_probes_see_none_and_models_import() -> None:
    models = "from diffusers import UNet2DConditionModel\nfrom transformers import CLIPTextModel\n"
    assert run_at_root("-c", models + PROBES).split() == ["False"] * 4


def test_with_the_installed_package_probes_see_its_version(stand_in: Path) -> None:
    stand_in_range, later, available, version = run_at_root("-c", PROBES, path=(stand_in,)).split()
    assert (stand_in_range, later) == ("True", "False")
    assert (available, version) == ("True", "True")


@pytest.mark.skipif(HUB_KERNELS_INSTALLED, reason="the Hub's kernels package is installed here")
def test_without_the_installed_package_nothing_can_be_taken_from_the_name() -> None:
    program = """
import kernels
assert not hasattr(kernels, "__file__") and kernels.__version__ == "0"
for statement in ("from kernels import get_kernel", "import kernels.layer"):
    try:
        exec(statement)
    except ImportError as error:
        print(type(error).__name__)
"""
    assert run_at_root("-c", program).split() == ["ImportError", "ModuleNotFoundError"]


def test_our_package_needs_neither_triton_nor_the_bare_name(stand_in: Path) -> None:
    program = """
import sys
sys.modules["triton"] = None
import fewstep.kernels
assert "kernels" not in sys.modules and not hasattr(fewstep.kernels, "__version__")
print(fewstep.kernels.__file__)
import kernels
assert kernels is not fewstep.kernels and kernels.get_kernel() == "the installed one"
"""
    output = run_at_root("-c", program, path=(stand_in,))
    assert Path(output.strip()).parts[-2:] == ("kernels", "__init__.py")
    assert not Path(output.strip()).is_relative_to(stand_in)
