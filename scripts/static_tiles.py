"""What the compiler makes of every tile of the attention kernels, without a GPU.

    python scripts/static_tiles.py [--arch 90 80] [--sizes 64 72 128] [--dtypes bfloat16 float32] [--tiles 128,64,2,8]
        [--kernels forward query key] [--masks none bias] [--check] [--output FILE.md]

A row for each kernel, head size, dtype, mask and architecture: registers of a thread, stack (spilt registers) in bytes,
shared memory, instructions, those of the tensor cores (wgmma: HGMMA), spills (LDL and STL) and the products that the
tile computes against those that the head size needs. --tiles: candidates in place of the table's. --check: exit 1 where
an entry of the table has more than 128 bytes of stack or more shared memory than the device has. Needs Triton alone.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import triton
from fewstep.kernels import attention_triton, attention_triton_backward
from fewstep.kernels.triton_tiles import Blocks, Tiles, fit, padded
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = (16, 32, 64, 72, 128, 160)  # 40 and 80 are padded as 64 and 128 are; 160 is SD 1.5's deepest level
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHARED = {90: 227 * 2**10, 80: 163 * 2**10, 89: 99 * 2**10}  # by architecture, of one program
MOST_STACK = 128
HEAD = (
    "kernel", "arch", "dtype", "head size", "mask", "tile", "registers", "stack", "shared", "instructions", "tensor",
    "spills", "work",
)  # fmt: skip


class Entry(NamedTuple):
    kernel: str
    arch: int
    dtype: str
    size: int
    mask: str
    blocks: Blocks


class Measured(NamedTuple):
    """Of one compiled kernel: see the head of this file. work: products computed per product needed."""

    registers: int
    stack: int
    shared: int
    instructions: int
    tensor: int
    spills: int
    work: float


def table_of(kernel: str, dtype: str) -> dict[int, Tiles]:
    module = attention_triton if kernel == "forward" else attention_triton_backward
    return module.SINGLE_TILES if dtype == "float32" else module.HALF_TILES


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    for arch, dtype, size, kernel, mask in product(
        args.arch, args.dtypes, args.sizes, args.kernels, args.masks
    ):
        table = table_of(kernel, dtype)
        if padded(size) not in table and not args.tiles:
            continue  # such calls run chunked
        for blocks in args.tiles or [table[padded(size)].of(mask != "none")]:
            if kernel == "forward":
                bytes_of_mask = 2 * 4 * (mask == "bias")  # a mask and its tangent in float32
                item = 4 if dtype == "float32" else 2
                blocks = fit(blocks, padded(size), item, SHARED[arch], bytes_of_mask)
            yield Entry(kernel, arch, dtype, size, mask, blocks)


def compiled(entry: Entry) -> Any:
    """The kernel as the wrapper calls it: contiguous rows, all tangents, a float32 mask with its tangent or none."""
    kernel = {
        "forward": attention_triton._forward_kernel,
        "query": attention_triton_backward._query_kernel,
        "key": attention_triton_backward._key_kernel,
    }[entry.kernel]
    blocks, size, names = entry.blocks, padded(entry.size), kernel.arg_names
    constants: dict[str, Any] = {
        "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_D": size, "BLOCK_DV": size, "CAUSAL": False,
        "PAD_D": size != entry.size, "PAD_DV": size != entry.size, "UPCAST": False, "ALIGNED": True,
        "PRECISION": "tf32x3" if entry.dtype == "float32" else "ieee", "dk": entry.size, "dv": entry.size,
        "MASK": entry.mask,
    }  # fmt: skip
    if entry.kernel == "forward":
        constants |= {"HAS_TQ": True, "HAS_TK": True, "HAS_TV": True, "HAS_TMASK": entry.mask == "bias"}
    if entry.mask != "none":
        constants["m_n"] = 1
        if entry.kernel == "forward":
            constants["tm_n"] = 1
    tensors = ("q", "k", "v", "tq", "tk", "tv", "out", "tangent", "do", "dq", "dk_out", "dv_out")
    types = dict.fromkeys(names, "i32") | dict.fromkeys(tensors, "*" + DTYPES[entry.dtype])
    types |= dict.fromkeys(("lse", "delta", "mask", "tmask"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    strides = {x + y for x in ("q", "k", "v", "tq", "tk", "tv", "do") for y in ("_b", "_h", "_l")}
    divisible = [n for n in names if types[n][0] == "*" or (n in strides and entry.size % 16 == 0)]
    source = ASTSource(
        kernel,
        {n: types[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)


def measured(entry: Entry) -> Measured:
    result = compiled(entry)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(result.asm["cubin"])
        usage, code = (
            subprocess.run(
                [str(CUOBJDUMP), flag, str(path)], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", code)
    return Measured(
        numbers["REG"],
        numbers["STACK"],
        result.metadata.shared,
        len(opcodes),
        sum(op in ("HGMMA", "HMMA") for op in opcodes),
        sum(op in ("LDL", "STL") for op in opcodes),
        round(padded(entry.size) / entry.size, 2),
    )


def wrong(entry: Entry, found: Measured) -> str | None:
    if found.stack > MOST_STACK:
        return f"{found.stack} bytes of stack"
    if found.shared > SHARED[entry.arch]:
        return f"{found.shared} bytes of shared memory, the device has {SHARED[entry.arch]}"
    return None


def row(entry: Entry, found: Measured) -> str:
    cells = (
        entry.kernel,
        f"sm_{entry.arch}",
        entry.dtype,
        entry.size,
        entry.mask,
        ", ".join(map(str, entry.blocks)),
    )
    return "| " + " | ".join(map(str, (*cells, *found))) + " |"


def tile(text: str) -> Blocks:
    return Blocks(*map(int, text.split(",")))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=SHARED)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", default=["forward", "query", "key"])
    parser.add_argument("--masks", nargs="+", default=["none", "bias"], choices=["none", "bias"])
    parser.add_argument("--tiles", type=tile, nargs="+", help="rows,columns,stages,warps")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    print("\n".join(lines))
    faults = []
    for entry in entries(args):
        found = measured(entry)
        lines.append(row(entry, found))
        print(lines[-1], flush=True)
        fault = wrong(entry, found)
        if fault is not None:
            faults.append(f"{' '.join(map(str, entry))}: {fault}")
    if args.output is not None:
        made = f"Triton {triton.__version__}: `python scripts/static_tiles.py {' '.join(arguments)}`"
        args.output.write_text("\n".join([made, "", *lines]) + "\n")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if args.check and faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
