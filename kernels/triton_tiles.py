"""What the forward and backward Triton kernels share: tiles, products, logits, launch details."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)  # of a finite bias in base 2


@triton.jit
def multiple_of_8(stride):
    """The stride itself: tl.multiple_of has no effect on a kernel's argument."""
    return stride // 8 * 8


@triton.jit
def load_tile(
    pointer, rows, columns, row_stride, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """pointer[rows, columns], 0 outside; ROWS and COLUMNS say which bounds need a check."""
    at = pointer + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if ROWS and COLUMNS:
        return tl.load(at, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)
    elif ROWS:
        return tl.load(at, mask=(rows < num_rows)[:, None], other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=(columns < num_columns)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a b in float32."""
    if UPCAST:  # the interpreter's dot misreads bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_mask(mask, rows, columns, row_stride, column_stride, lq, lk):
    inside = (rows < lq)[:, None] & (columns < lk)[None, :]
    at = mask + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(at, mask=inside, other=0)


@triton.jit
def logits(
    s, rows, columns, lq, lk, mask, row_stride, column_stride, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """log2(e) (scale s + bias), -inf at hidden pairs and, with EDGE, above the diagonal and beyond the last key."""
    s = s * (scale * LOG2_E)
    if MASK == "bool":
        s = tl.where(load_mask(mask, rows, columns, row_stride, column_stride, lq, lk) != 0, s, float("-inf"))
    if MASK == "bias":
        bias = load_mask(mask, rows, columns, row_stride, column_stride, lq, lk).to(tl.float32)
        s += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2_E, LOWEST))
    if EDGE:
        s = tl.where((columns < lk)[None, :], s, float("-inf"))
        if CAUSAL:
            s = tl.where(columns[None, :] <= rows[:, None], s, float("-inf"))
    return s


class Blocks(NamedTuple):
    rows: int
    columns: int
    stages: int
    warps: int


class Tiles(NamedTuple):
    """Of one head size: without a mask, and with one, whose indices and values take registers of their own."""

    plain: Blocks
    masked: Blocks

    def of(self, masked: bool) -> Blocks:
        return self.masked if masked else self.plain


def fit(blocks: Blocks, head_size: int, item_size: int, shared_memory: int, mask_size: int = 0) -> Blocks:
    """Fewer stages, then keys, then queries, until the tiles of the forward fit into `shared_memory` bytes."""
    while stage_bytes(blocks, head_size, item_size, mask_size) > shared_memory and blocks[:3] != (16, 16, 1):
        if blocks.stages > 1:
            blocks = blocks._replace(stages=blocks.stages - 1)
        elif blocks.columns > 16:
            blocks = blocks._replace(columns=blocks.columns // 2)
        else:
            blocks = blocks._replace(rows=blocks.rows // 2)
    return blocks


def stage_bytes(blocks: Blocks, head_size: int, item_size: int, mask_size: int = 0) -> int:
    """K, tK, V, tV and the masks, `mask_size` bytes per pair, per stage; Q, tQ once."""
    rows, columns, stages, _ = blocks
    return (4 * stages * columns + 2 * rows) * head_size * item_size + stages * rows * columns * mask_size


def shared_memory(q: Tensor) -> int:
    """Bytes that one program may use on q's device; a Hopper's in the interpreter."""
    if q.device.type != "cuda":
        return 227 * 2**10
    properties: Any = torch.cuda.get_device_properties(q.device)  # some stubs lack the attribute
    return properties.shared_memory_per_block_optin


def padded(size: int) -> int:
    """A head size as a tile's side: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def unit_rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> bool:
    """Whether every row of x starts at a multiple of 16 bytes and of 8 elements: loads of 16 bytes at any head size."""
    return x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1])


def mask_kind(bias: Tensor | None) -> str:
    return "none" if bias is None else "bool" if bias.dtype == torch.bool else "bias"


def precision(q: Tensor) -> str:
    """Three TF32 products keep float32's accuracy; one TF32 product would lose it."""
    return "tf32x3" if q.dtype == torch.float32 else "ieee"


def device_of(q: Tensor) -> Any:
    """Triton launches on the current device: make it q's."""
    return torch.cuda.device_of(q)
