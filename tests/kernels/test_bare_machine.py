"""A machine with torch, triton, numpy and pytest alone runs the kernels, their tests and their benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What pyproject.toml asks for beside torch and numpy, and some of what these bring.
ABSENT = """
accelerate cv2 datasets diffusers huggingface_hub open_clip peft PIL psutil pydantic safetensors scipy timm tokenizers
torch_fidelity torchao torchmetrics torchvision tqdm transformers yaml
"""
BARE = f"""
import runpy, sys
from importlib.machinery import PathFinder

ABSENT = set({ABSENT!r}.split())
found = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda _, name, *rest: None if name.partition(".")[0] in ABSENT else found(name, *rest)
)
sys.argv = sys.argv[1:]
"""


def bare(code: str, *arguments: str) -> str:
    """What a process on such a machine prints."""
    done = subprocess.run(
        [sys.executable, "-c", BARE + code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_package_that_is_said_to_be_absent_is() -> None:
    with pytest.raises(AssertionError, match="No module named 'pydantic'"):
        bare("import fewstep.distill.settings")


def test_kernels() -> None:
    code = """
import torch
from fewstep.kernels import attention_jvp

q = torch.randn(1, 2, 8, 16)
out, tangent, _ = attention_jvp(q, q, q, q, q, q)
print(tuple(out.shape), tuple(tangent.shape))
"""
    assert bare(code).split("\n")[0] == "(1, 2, 8, 16) (1, 2, 8, 16)"


@pytest.mark.parametrize("name", ["test_attention_gpu", "test_attention_values", "test_attention_semantics"])
def test_the_tests_are_found(name: str) -> None:
    arguments = ["pytest", "-q", "--collect-only", f"tests/kernels/{name}.py"]
    said = bare("runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)", *arguments)
    assert f"{name}.py::" in said and "error" not in said.lower()


def test_the_benchmark_starts() -> None:
    script = "scripts/benchmark_attention.py"
    assert "--contenders" in bare(f"runpy.run_path({script!r}, run_name='__main__')", script, "--help")
