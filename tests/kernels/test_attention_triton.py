"""The Triton kernels without a GPU: interpreted, and compiled for a Hopper, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux alone")


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
    output = run(*arguments, TRITON_INTERPRET="1")
    assert re.search(r"^\d+ passed", output, re.MULTILINE) and "skipped" not in output


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewstep.kernels import attention_triton, attention_triton_backward as backward
from fewstep.kernels.triton_tiles import fit, padded, stage_bytes

def compiled(kernel, blocks, size, dtype="bf16", mask="bf16", causal=False, **settings):
    names = kernel.arg_names
    constants = dict(
        BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, BLOCK_D=padded(size), BLOCK_DV=padded(size), CAUSAL=causal,
        PAD_D=padded(size) != size, PAD_DV=padded(size) != size, PRECISION="tf32x3" if dtype == "fp32" else "ieee",
        UPCAST=False, ALIGNED=True, dk=size, dv=size, m_n=1, **settings,
    )
    tensors = "q k v tq tk tv out tangent do dq dk_out dv_out".split()
    types = dict.fromkeys(names, "i32") | dict.fromkeys(tensors, "*" + dtype) | dict.fromkeys(constants, "constexpr")
    types |= {"scale": "fp32", "lse": "*fp32", "delta": "*fp32", "mask": "*" + mask, "tmask": "*" + mask}
    strides = [x + y for x in ("q", "k", "v", "tq", "tk", "tv", "do") for y in ("_b", "_h", "_l")]
    divisible = [n for n in names if types[n][0] == "*" or (n in strides and size % 16 == 0)]
    source = ASTSource(
        kernel, {n: types[n] for n in names}, constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

def async_copies(result):
    return len(re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global[^;]*, 0x10", result.asm["ptx"]))

forward = attention_triton._forward_kernel
ALL = dict(HAS_TQ=True, HAS_TK=True, HAS_TV=True)
for size in (40, 64, 72, 256):
    blocks, smaller = attention_triton.HALF_TILES[padded(size)].plain, backward.HALF_TILES[padded(size)].masked
    result = compiled(forward, blocks, size, MASK="none", HAS_TMASK=False, **ALL)
    used = result.metadata.shared
    assert used <= 227 * 1024, (size, blocks, used)
    assert used <= 1.05 * stage_bytes(blocks, padded(size), 2), (size, blocks, used)
    assert async_copies(result), ("no copies of 16 bytes", size)
    for kernel in (backward._query_kernel, backward._key_kernel):
        result = compiled(kernel, smaller, size, MASK="bool", mask="i1")
        assert result.metadata.shared <= 99 * 1024, (size, smaller, result.metadata.shared)
        assert not re.search(r"ld\\.global[^;]*b16", result.asm["ptx"]), ("loads of 2 bytes", size)
for dtype, causal, mask_size, limit in (("bf16", True, 0, 227), ("bf16", False, 8, 227), ("fp32", False, 8, 99)):
    item, table = (4, attention_triton.SINGLE_TILES) if dtype == "fp32" else (2, attention_triton.HALF_TILES)
    blocks = fit(table[64].of(mask_size > 0), 64, item, limit * 1024, mask_size)
    mask = dict(MASK="bias" if mask_size else "none", HAS_TMASK=mask_size > 0, mask="fp32")
    used = compiled(forward, blocks, 64, dtype, causal=causal, **mask, **ALL).metadata.shared
    assert used <= min(limit * 1024, 1.05 * stage_bytes(blocks, 64, item, mask_size)), (dtype, blocks, used)
for kernel in (backward._query_kernel, backward._key_kernel):
    used = compiled(kernel, backward.SINGLE_TILES[64].masked, 64, "fp32", "fp32", MASK="bias").metadata.shared
    assert used <= 99 * 1024, used
print("compiled")
"""


@pytest.mark.slow
def test_compiled_for_a_hopper_within_its_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "compile_kernels.py").write_text(COMPILE)
    output = run(
        str(tmp_path / "compile_kernels.py"), TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_INTERPRET="0"
    )
    assert output.endswith("compiled\n")


@pytest.mark.slow
def test_no_tile_spills(tmp_path: Path) -> None:
    """Every entry of the tables, for a Hopper and an Ampere, with and without masks."""
    script = HERE.parents[1] / "scripts" / "static_tiles.py"
    said = run(str(script), "--check", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert said.count("| forward | sm_90 |") == said.count("| forward | sm_80 |") == 18
    assert said.count("| key |") == said.count("| query |") == 36
