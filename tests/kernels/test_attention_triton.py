"""The Triton kernels without a GPU: interpreted, and compiled for a Hopper, in processes of their own."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def version(name: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(name).split(".")[:2]
    return int(major), int(minor)


if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if version("triton") < (3, 9) and version("numpy") >= (2, 4):
    pytest.skip("this Triton's interpreter needs numpy < 2.4", allow_module_level=True)


def run(*arguments: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    return finished.stdout


def test_interpreted() -> None:
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py"))
    assert "passed" in run(*arguments, TRITON_INTERPRET="1")


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewstep.kernels import attention_triton, attention_triton_backward as backward
from fewstep.kernels.triton_tiles import stage_bytes

def shared_memory(kernel, blocks, size, **settings):
    names = kernel.arg_names
    padded = attention_triton.padded(size)
    constants = dict(
        BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, BLOCK_D=padded, BLOCK_DV=padded, CAUSAL=False,
        PAD_D=padded != size, PAD_DV=padded != size, PRECISION="ieee", UPCAST=False, **settings,
    )
    types = {n: "i32" for n in names} | {"scale": "fp32", "lse": "*fp32", "delta": "*fp32"}
    tensors = "q k v tq tk tv mask tmask out tangent do dq dk_out dv_out".split()
    types |= {n: "*bf16" for n in names if n in tensors} | dict.fromkeys(constants, "constexpr")
    lengths = {"num_heads", "lq", "lk", "scale"} | set(constants)
    source = ASTSource(
        kernel, {n: types[n] for n in names}, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in lengths},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared

ALL = dict(HAS_TQ=True, HAS_TK=True, HAS_TV=True, HAS_TMASK=False)
for size in (64, 72, 256):
    padded = attention_triton.padded(size)
    blocks, smaller = attention_triton.HALF_BLOCKS[padded], backward.HALF_BLOCKS[padded]
    used = shared_memory(attention_triton._forward_kernel, blocks, size, MASK="none", **ALL)
    assert used <= 227 * 1024, (size, blocks, used)
    assert used <= 1.05 * stage_bytes(blocks, padded, 2), (size, blocks, used)
    for kernel in (backward._query_kernel, backward._key_kernel):
        used = shared_memory(kernel, smaller, size, MASK="bool")
        assert used <= 99 * 1024, (size, smaller, used)
print("compiled")
"""


@pytest.mark.slow
def test_compiled_for_a_hopper_within_its_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "compile_kernels.py").write_text(COMPILE)
    output = run(
        str(tmp_path / "compile_kernels.py"), TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0"
    )
    assert output.endswith("compiled\n")
