"""Backward of the primal: ATen's flash kernel where it is valid, else ours (arXiv 2307.08691, algorithm 2)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunked
from .environment import interpreting
from .triton_tiles import (
    LOG2_E,
    LOWEST,
    Blocks,
    Tiles,
    aligned,
    device_of,
    load_tile,
    logits,
    mask_kind,
    multiple_of_8,
    padded,
    precision,
    product,
    unit_rows,
)


@triton.jit
def _score_gradient(
    q, k, v, do, row_lse, row_delta, rows, columns, lq, lk, mask, m_l, m_n, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P = exp(S - LSE) and dS = P * (dO V^T - delta) of one block of pairs."""
    s = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    s = product(q, tl.trans(k), s, PRECISION, UPCAST)
    s = logits(s, rows, columns, lq, lk, mask, m_l, m_n, scale, MASK, CAUSAL, True)
    p = tl.exp2(tl.minimum(s - row_lse[:, None], 0.0))
    dp = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    dp = product(do, tl.trans(v), dp, PRECISION, UPCAST)
    ds = p * tl.where(s == float("-inf"), 0.0, dp - row_delta[:, None])
    return p, ds


@triton.jit
def _load_rows(lse, delta, head, rows, lq):
    """LSE in base 2, 0 for a fully masked row, and delta; a row whose bias `logits` cut off is cut off too."""
    row_lse = tl.load(lse + head * lq + rows, mask=rows < lq, other=0.0)
    row_delta = tl.load(delta + head * lq + rows, mask=rows < lq, other=0.0)
    base_2 = tl.where(row_lse < 0.69 * LOWEST, LOWEST, row_lse * LOG2_E)
    return tl.where(row_lse == float("-inf"), 0.0, base_2), row_delta


@triton.jit
def _query_kernel(
    q, k, v, do, mask, lse, delta, dq,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, m_b, m_h, m_l, m_n,
    num_heads, lq, lk, dk: tl.constexpr, dv: tl.constexpr, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K for BLOCK_M queries of one head."""
    if ALIGNED:
        q_b, q_h, q_l = multiple_of_8(q_b), multiple_of_8(q_h), multiple_of_8(q_l)
        k_b, k_h, k_l = multiple_of_8(k_b), multiple_of_8(k_h), multiple_of_8(k_l)
        v_b, v_h, v_l = multiple_of_8(v_b), multiple_of_8(v_h), multiple_of_8(v_l)
        do_b, do_h, do_l = multiple_of_8(do_b), multiple_of_8(do_h), multiple_of_8(do_l)
    num_blocks = tl.cdiv(lq, BLOCK_M)
    row_start = (tl.program_id(0) % num_blocks) * BLOCK_M
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    rows = row_start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    mask += b * m_b + h * m_h
    queries = load_tile(q + b * q_b + h * q_h, rows, d, q_l, lq, dk, True, PAD_D)
    grads = load_tile(do + b * do_b + h * do_h, rows, e, do_l, lq, dv, True, PAD_DV)
    row_lse, row_delta = _load_rows(lse, delta, head, rows, lq)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    end = lk
    if CAUSAL:
        end = tl.minimum(lk, row_start + BLOCK_M)
    for k_start in range(0, end, BLOCK_N):
        columns = k_start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, columns, d, k_l, lk, dk, True, PAD_D)
        values = load_tile(v, columns, e, v_l, lk, dv, True, PAD_DV)
        _, ds = _score_gradient(
            queries, keys, values, grads, row_lse, row_delta, rows, columns, lq, lk, mask, m_l, m_n, scale,
            MASK, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip
        acc = product(ds.to(keys.dtype), keys, acc, PRECISION, UPCAST)
    at = (head * lq + rows.to(tl.int64))[:, None] * dk + d[None, :]
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=(rows < lq)[:, None] & (d < dk)[None, :])


@triton.jit
def _key_kernel(
    q, k, v, do, mask, lse, delta, dk_out, dv_out,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, m_b, m_h, m_l, m_n,
    num_heads, lq, lk, dk: tl.constexpr, dv: tl.constexpr, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO for BLOCK_N keys of one head."""
    if ALIGNED:
        q_b, q_h, q_l = multiple_of_8(q_b), multiple_of_8(q_h), multiple_of_8(q_l)
        k_b, k_h, k_l = multiple_of_8(k_b), multiple_of_8(k_h), multiple_of_8(k_l)
        v_b, v_h, v_l = multiple_of_8(v_b), multiple_of_8(v_h), multiple_of_8(v_l)
        do_b, do_h, do_l = multiple_of_8(do_b), multiple_of_8(do_h), multiple_of_8(do_l)
    num_blocks = tl.cdiv(lk, BLOCK_N)
    k_start = (tl.program_id(0) % num_blocks) * BLOCK_N
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b, h = head // num_heads, head % num_heads
    columns = k_start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    mask += b * m_b + h * m_h
    keys = load_tile(k + b * k_b + h * k_h, columns, d, k_l, lk, dk, True, PAD_D)
    values = load_tile(v + b * v_b + h * v_h, columns, e, v_l, lk, dv, True, PAD_DV)
    key_grads = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    value_grads = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    start = 0
    if CAUSAL:
        start = (k_start // BLOCK_M) * BLOCK_M
    for row_start in range(start, lq, BLOCK_M):
        rows = row_start + tl.arange(0, BLOCK_M)
        queries = load_tile(q, rows, d, q_l, lq, dk, True, PAD_D)
        grads = load_tile(do, rows, e, do_l, lq, dv, True, PAD_DV)
        row_lse, row_delta = _load_rows(lse, delta, head, rows, lq)
        p, ds = _score_gradient(
            queries, keys, values, grads, row_lse, row_delta, rows, columns, lq, lk, mask, m_l, m_n, scale,
            MASK, CAUSAL, PRECISION, UPCAST,
        )  # fmt: skip
        value_grads = product(tl.trans(p.to(grads.dtype)), grads, value_grads, PRECISION, UPCAST)
        key_grads = product(tl.trans(ds.to(queries.dtype)), queries, key_grads, PRECISION, UPCAST)
    place = (head * lk + columns.to(tl.int64))[:, None]
    inside = (columns < lk)[:, None]
    tl.store(
        dk_out + place * dk + d[None, :],
        (key_grads * scale).to(dk_out.dtype.element_ty),
        mask=inside & (d < dk)[None, :],
    )
    tl.store(
        dv_out + place * dv + e[None, :],
        value_grads.to(dv_out.dtype.element_ty),
        mask=inside & (e < dv)[None, :],
    )


HALF_TILES = {
    16: Tiles(Blocks(64, 64, 2, 4), Blocks(64, 64, 2, 4)),
    32: Tiles(Blocks(64, 64, 2, 4), Blocks(64, 64, 2, 4)),
    64: Tiles(Blocks(64, 64, 2, 4), Blocks(64, 64, 2, 4)),
    128: Tiles(Blocks(64, 64, 1, 4), Blocks(64, 32, 2, 4)),
    256: Tiles(Blocks(32, 32, 1, 4), Blocks(32, 32, 1, 4)),
}
SINGLE_TILES = {
    16: Tiles(Blocks(32, 32, 2, 4), Blocks(32, 32, 2, 4)),
    32: Tiles(Blocks(32, 32, 2, 4), Blocks(32, 32, 2, 4)),
    64: Tiles(Blocks(16, 32, 2, 4), Blocks(16, 32, 2, 4)),
}
"""As those of the forward."""


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dQ, dK, dV and, if `bias_grad`, dBias of the primal from its O and LSE, as `chunked.backward`.

    A bias that needs a gradient takes the chunked back end: a sum over broadcast dimensions fits no block of ours.
    """
    if bias_grad:
        return chunked.backward(grad_out, q, k, v, bias, out, lse, is_causal, scale, bias_grad)
    out, lse = out.contiguous(), lse.contiguous()
    if flash_applies(q, k, v, bias, is_causal, scale):
        return (*flash_backward(grad_out, q, k, v, out, lse, is_causal, scale), None)
    batch, num_heads, lq, d = q.shape
    lk, dv = v.shape[2:]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    if lq == 0 or lk == 0 or batch == 0 or num_heads == 0:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), None
    tensors = [unit_rows(x) for x in (q, k, v, grad_out)]
    mask = out if bias is None else bias.expand(batch, num_heads, lq, lk)
    delta = (grad_out.float() * out.float()).sum(-1).contiguous()
    strides = [x.stride(i) for x in tensors for i in range(3)]
    strides += [0 if bias is None else mask.stride(i) for i in range(4)]
    block_d, block_dv = padded(d), padded(dv)
    tiles = (SINGLE_TILES if q.dtype == torch.float32 else HALF_TILES)[max(block_d, block_dv)]
    blocks = tiles.of(bias is not None)
    settings = {
        "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "MASK": mask_kind(bias), "CAUSAL": is_causal, "PAD_D": d != block_d, "PAD_DV": dv != block_dv,
        "PRECISION": precision(q), "UPCAST": interpreting(), "ALIGNED": all(map(aligned, tensors)),
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
    sizes = (num_heads, lq, lk, d, dv, scale)
    with device_of(q):
        _query_kernel[(triton.cdiv(lq, blocks.rows) * batch * num_heads,)](
            *tensors, mask, lse, delta, grads[0], *strides, *sizes, **settings
        )
        _key_kernel[(triton.cdiv(lk, blocks.columns) * batch * num_heads,)](
            *tensors, mask, lse, delta, grads[1], grads[2], *strides, *sizes, **settings
        )
    return grads[0], grads[1], grads[2], None


def flash_applies(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> bool:
    """ATen's flash kernel: 16 bits, no mask, one head size in steps of 8, aligned rows, Ampere on, causal if
    square and its scale positive, which multiplies hidden scores of -inf."""
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and (scale > 0 or not is_causal)
        and q.dtype != torch.float32
        and bias is None
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.numel() > 0
        and k.numel() > 0
        and (not is_causal or q.shape[2] == k.shape[2])
        and all(aligned(unit_rows(x)) for x in (q, k, v))
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Without dropout the random state is not read: empty lengths mean one length per batch."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out.contiguous(), q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal,
        state, unused, scale=scale,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
