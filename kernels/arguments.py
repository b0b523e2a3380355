"""Checks and normal form of the arguments that `attention` and `attention_jvp` share."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Problem(NamedTuple):
    """q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv); mask broadcasts to (B, H, Lq, Lk) or is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float


def normalise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Problem:
    """Four dimensions, heads repeated for grouped queries, leading dimensions broadcast, scale filled in."""
    check(q, k, v, mask, dropout_p, is_causal)
    q, k, v = four_dimensional(q), four_dimensional(k), four_dimensional(v)
    if enable_gqa:
        k, v = repeat_heads("k", k, q.shape[1]), repeat_heads("v", v, q.shape[1])
    q, k, v = broadcast_leading(q, k, v)
    if mask is not None:
        mask = broadcastable(mask, (*q.shape[:3], k.shape[2]))
    return Problem(q, k, v, mask, bool(is_causal), q.shape[-1] ** -0.5 if scale is None else float(scale))


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    if dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}: this attention has no dropout; pass dropout_p=0.0.")
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; cast it to float16, bfloat16, float32 or float64.")
    if not 2 <= q.ndim <= 4:
        raise ValueError(f"q has {q.ndim} dimensions; reshape it to (B, H, L, D).")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} and q {q.dtype}; cast them to one dtype.")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; move them to one device.")
        if x.ndim != q.ndim:
            raise ValueError(f"{name} has {x.ndim} dimensions and q {q.ndim}; reshape them to (B, H, L, D).")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head size {k.shape[-1]} and q {q.shape[-1]}; project them to one size.")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v has {v.shape[-2]} positions and k {k.shape[-2]}; pass one value per key.")
    if mask is None:
        return
    if is_causal:
        raise ValueError("is_causal is True beside attn_mask; put the causal mask into attn_mask.")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask has dtype {mask.dtype}; cast it to bool or to the dtype of q.")
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device} and q on {q.device}; move them to one device.")


def four_dimensional(x: Tensor) -> Tensor:
    for _ in range(4 - x.ndim):
        x = x.unsqueeze(0)
    return x


def repeat_heads(name: str, x: Tensor, num_heads: int) -> Tensor:
    """Grouped queries: head h of q sees head h // (num_heads / heads of x)."""
    if num_heads % x.shape[1]:
        raise ValueError(f"{name} has {x.shape[1]} heads, no divisor of q's {num_heads}; pass a divisor.")
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def broadcast_leading(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        leading = torch.broadcast_shapes(q.shape[:2], k.shape[:2], v.shape[:2])
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v have shapes {shapes}, whose (B, H) do not broadcast; pass equal ones or enable_gqa=True."
        ) from error
    expand = [x if x.shape[:2] == leading else x.expand(*leading, -1, -1) for x in (q, k, v)]
    return expand[0], expand[1], expand[2]


def broadcastable(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Leading ones are added; nothing is expanded, so that the gradient of a bias keeps its size."""
    full = four_dimensional(mask)
    if full.ndim != 4 or any(m not in (1, s) for m, s in zip(full.shape, shape, strict=True)):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}; pass one that broadcasts to {shape}.")
    return full


def check_tangent(name: str, tangent: Tensor | None, primal: Tensor) -> Tensor | None:
    """None for a missing tangent and for torch's symbolic zeros: both save their products."""
    if tangent is None or (not torch.compiler.is_compiling() and tangent._is_zerotensor()):
        return None
    if tangent.shape != primal.shape or tangent.dtype != primal.dtype or tangent.device != primal.device:
        raise ValueError(
            f"{name} is {tuple(tangent.shape)} {tangent.dtype} on {tangent.device}; pass the shape, dtype and "
            f"device of its primal, {tuple(primal.shape)} {primal.dtype} on {primal.device}."
        )
    return tangent
