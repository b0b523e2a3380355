"""Attention with a forward-mode derivative in Triton: O, tO and LSE in one streaming pass over keys and values.

The recurrence, its row shift and the block sizes are explained in README.md. Written for Triton 3.6 and 3.9: plain
pointers, lengths and strides at run time, 64-bit offsets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton_backward import backward
from .environment import interpreting
from .triton_tiles import (
    LN_2,
    Blocks,
    Tiles,
    aligned,
    device_of,
    fit,
    load_mask,
    load_tile,
    logits,
    mask_kind,
    multiple_of_8,
    padded,
    precision,
    product,
    shared_memory,
    unit_rows,
)

__all__ = ["backward", "forward"]


@triton.jit
def _scores(
    k_start, q, tq, rows, k, tk, mask, tmask, k_l, tk_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TMASK: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PAD_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """S in base 2 and tS in natural units for one key block; tS is 0 at hidden pairs."""
    columns = k_start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = tl.trans(load_tile(k, columns, d, k_l, lk, dk, EDGE, PAD_D))
    s = tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32)
    s = product(q, keys, s, PRECISION, UPCAST)
    s = logits(s, rows, columns, lq, lk, mask, m_l, m_n, scale, MASK, CAUSAL, EDGE)
    ts = tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32)
    if HAS_TQ:
        ts = product(tq, keys, ts, PRECISION, UPCAST)
    if HAS_TK:
        key_tangents = tl.trans(load_tile(tk, columns, d, tk_l, lk, dk, EDGE, PAD_D))
        ts = product(q, key_tangents, ts, PRECISION, UPCAST)
    ts = ts * scale
    if HAS_TMASK:
        ts += load_mask(tmask, rows, columns, tm_l, tm_n, lq, lk).to(tl.float32)
    if EDGE or MASK != "none":
        ts = tl.where(s == float("-inf"), 0.0, ts)
    return s, ts


@triton.jit
def _first_mean(s, ts):
    """Mean of tS under the softmax of one key block, 0 for a row that the block hides: the row shift."""
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return tl.sum(p * ts, 1) / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _step(
    k_start, q, tq, rows, top, total, moment, centre, out, change,
    k, tk, v, tv, mask, tmask, k_l, tk_l, v_l, tv_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, dv, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_TMASK: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One key block of the recurrence; EDGE checks bounds and the diagonal."""
    s, ts = _scores(
        k_start, q, tq, rows, k, tk, mask, tmask, k_l, tk_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, scale,
        BLOCK_N, BLOCK_D, HAS_TQ, HAS_TK, HAS_TMASK, MASK, CAUSAL, PAD_D, PRECISION, UPCAST, EDGE,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - finite_top)
    p = tl.exp2(s - finite_top[:, None])
    total = total * decay + tl.sum(p, 1)
    columns = k_start + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_DV)
    values = load_tile(v, columns, e, v_l, lk, dv, EDGE, PAD_DV)
    weights = p.to(values.dtype)
    out = product(weights, values, out * decay[:, None], PRECISION, UPCAST)
    if HAS_TQ or HAS_TK or HAS_TMASK:
        h = p * (ts - centre[:, None])
        moment = moment * decay + tl.sum(h, 1)
        change = product(h.to(values.dtype), values, change * decay[:, None], PRECISION, UPCAST)
        if HAS_TV:
            value_tangents = load_tile(tv, columns, e, tv_l, lk, dv, EDGE, PAD_DV)
            change = product(weights, value_tangents, change, PRECISION, UPCAST)
    elif HAS_TV:
        value_tangents = load_tile(tv, columns, e, tv_l, lk, dv, EDGE, PAD_DV)
        change = product(weights, value_tangents, change * decay[:, None], PRECISION, UPCAST)
    return new_top, total, moment, out, change


@triton.jit
def _forward_kernel(
    q, k, v, tq, tk, tv, mask, tmask, out, tangent, lse,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, tv_b, tv_h, tv_l,
    m_b, m_h, m_l, m_n, tm_b, tm_h, tm_l, tm_n,
    num_heads, lq, lk, dk: tl.constexpr, dv: tl.constexpr, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, HAS_TMASK: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M queries of one head; consecutive programs share a head's keys in L2."""
    if ALIGNED:
        q_b, q_h, q_l = multiple_of_8(q_b), multiple_of_8(q_h), multiple_of_8(q_l)
        k_b, k_h, k_l = multiple_of_8(k_b), multiple_of_8(k_h), multiple_of_8(k_l)
        v_b, v_h, v_l = multiple_of_8(v_b), multiple_of_8(v_h), multiple_of_8(v_l)
        tq_b, tq_h, tq_l = multiple_of_8(tq_b), multiple_of_8(tq_h), multiple_of_8(tq_l)
        tk_b, tk_h, tk_l = multiple_of_8(tk_b), multiple_of_8(tk_h), multiple_of_8(tk_l)
        tv_b, tv_h, tv_l = multiple_of_8(tv_b), multiple_of_8(tv_h), multiple_of_8(tv_l)
    num_row_blocks = tl.cdiv(lq, BLOCK_M)
    row_start = (tl.program_id(0) % num_row_blocks) * BLOCK_M
    head = (tl.program_id(0) // num_row_blocks).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    rows = row_start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    queries = load_tile(q + b * q_b + h * q_h, rows, d, q_l, lq, dk, True, PAD_D)
    query_tangents = queries
    if HAS_TQ:
        query_tangents = load_tile(tq + b * tq_b + h * tq_h, rows, d, tq_l, lq, dk, True, PAD_D)
    if HAS_TK:
        tk += b * tk_b + h * tk_h
    if HAS_TV:
        tv += b * tv_b + h * tv_h
    if MASK != "none":
        mask += b * m_b + h * m_h
    if HAS_TMASK:
        tmask += b * tm_b + h * tm_h

    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    moment = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    change = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    end = lk
    plain_end = (lk // BLOCK_N) * BLOCK_N
    if CAUSAL:
        end = tl.minimum(lk, row_start + BLOCK_M)
        plain_end = tl.minimum(plain_end, ((row_start + 1) // BLOCK_N) * BLOCK_N)
    centre = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_TQ or HAS_TK or HAS_TMASK:
        s, ts = _scores(
            0, queries, query_tangents, rows, k, tk, mask, tmask, k_l, tk_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, scale,
            BLOCK_N, BLOCK_D, HAS_TQ, HAS_TK, HAS_TMASK, MASK, CAUSAL, PAD_D, PRECISION, UPCAST, True,
        )  # fmt: skip
        centre = _first_mean(s, ts)
    for k_start in range(0, plain_end, BLOCK_N):
        top, total, moment, acc, change = _step(
            k_start, queries, query_tangents, rows, top, total, moment, centre, acc, change, k, tk, v, tv, mask, tmask,
            k_l, tk_l, v_l, tv_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, dv, scale, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_TQ, HAS_TK, HAS_TV, HAS_TMASK, MASK, CAUSAL, PAD_D, PAD_DV, PRECISION, UPCAST, False,
        )  # fmt: skip
    for k_start in range(plain_end, end, BLOCK_N):
        top, total, moment, acc, change = _step(
            k_start, queries, query_tangents, rows, top, total, moment, centre, acc, change, k, tk, v, tv, mask, tmask,
            k_l, tk_l, v_l, tv_l, m_l, m_n, tm_l, tm_n, lq, lk, dk, dv, scale, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_TQ, HAS_TK, HAS_TV, HAS_TMASK, MASK, CAUSAL, PAD_D, PAD_DV, PRECISION, UPCAST, True,
        )  # fmt: skip

    norm = tl.where(total == 0.0, 1.0, total)
    acc = acc / norm[:, None]
    inside = (rows < lq)[:, None] & (e < dv)[None, :]
    at = (head * lq + rows.to(tl.int64))[:, None] * dv + e[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * lq + rows, (top + tl.log2(norm)) * LN_2, mask=rows < lq)
    if HAS_TQ or HAS_TK or HAS_TV or HAS_TMASK:
        change = change / norm[:, None] - (moment / norm)[:, None] * acc
        tl.store(tangent + at, change.to(tangent.dtype.element_ty), mask=inside)


HALF_TILES = {
    16: Tiles(Blocks(128, 64, 3, 8), Blocks(64, 32, 2, 4)),
    32: Tiles(Blocks(128, 64, 3, 8), Blocks(64, 32, 2, 4)),
    64: Tiles(Blocks(128, 64, 3, 8), Blocks(64, 64, 2, 4)),
    128: Tiles(Blocks(128, 32, 3, 8), Blocks(32, 32, 2, 4)),
    256: Tiles(Blocks(16, 32, 2, 4), Blocks(16, 32, 2, 4)),
}
SINGLE_TILES = {
    16: Tiles(Blocks(64, 32, 2, 4), Blocks(64, 16, 2, 4)),
    32: Tiles(Blocks(64, 32, 2, 4), Blocks(64, 16, 2, 4)),
    64: Tiles(Blocks(16, 32, 2, 4), Blocks(16, 32, 2, 8)),
}
"""By the head size rounded up to a power of two, for 16-bit and float32 inputs: the largest found that keep their
numbers in registers (`scripts/static_tiles.py --check`). Three TF32 products of a wider head do not fit."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    bias: Tensor | None,
    tbias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """O and tO in one pass over key blocks (arXiv 2510.08431, appendix C), with one merged tangent accumulator.

    Shapes and results as `chunked.forward`, LSE in float32; head sizes up to 256 in float16 and bfloat16, up to 64
    in float32 (three TF32 products per float32 product on the device, exact in the interpreter).
    """
    batch, num_heads, lq, d = q.shape
    lk, dv = v.shape[2:]
    out = q.new_empty(batch, num_heads, lq, dv)
    lse = q.new_empty(batch, num_heads, lq, dtype=torch.float32)
    tangent = torch.empty_like(out) if any(t is not None for t in (tq, tk, tv, tbias)) else None
    if lq == 0 or lk == 0 or batch == 0 or num_heads == 0:
        return out.zero_(), None if tangent is None else tangent.zero_(), lse.fill_(-torch.inf)
    block_d, block_dv = padded(d), padded(dv)
    widest = max(block_d, block_dv)
    blocks = (SINGLE_TILES if q.dtype == torch.float32 else HALF_TILES)[widest].of(bias is not None)
    mask_size = sum(x.element_size() for x in (bias, tbias) if x is not None)
    blocks = fit(blocks, widest, q.element_size(), shared_memory(q), mask_size)
    tensors = [None if x is None else unit_rows(x) for x in (q, k, v, tq, tk, tv)]
    masks = [None if x is None else x.expand(batch, num_heads, lq, lk) for x in (bias, tbias)]
    strides = [0 if x is None else x.stride(i) for x in tensors for i in range(3)]
    strides += [0 if x is None else x.stride(i) for x in masks for i in range(4)]
    pointers = [out if x is None else x for x in (*tensors, *masks)]
    grid = (triton.cdiv(lq, blocks.rows) * batch * num_heads,)
    with device_of(q):
        _forward_kernel[grid](
            *pointers, out, out if tangent is None else tangent, lse, *strides, num_heads, lq, lk, d, dv, scale,
            BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, BLOCK_D=block_d, BLOCK_DV=block_dv,
            HAS_TQ=tq is not None, HAS_TK=tk is not None, HAS_TV=tv is not None, HAS_TMASK=tbias is not None,
            MASK=mask_kind(bias), CAUSAL=is_causal, PAD_D=d != block_d, PAD_DV=dv != block_dv,
            PRECISION=precision(q), UPCAST=interpreting(), ALIGNED=all(x is None or aligned(x) for x in tensors),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, tangent, lse
