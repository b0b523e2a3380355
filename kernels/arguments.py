"""Checks and normal form of the arguments that `attention` and `attention_jvp` share."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "mps", "xpu", "xla", "hpu")
    if torch.amp.is_autocast_available(device)
)
"""Asked once: Dynamo of torch 2.11 cannot trace the question."""


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
    check(q, k, v, mask, dropout_p, is_causal, enable_gqa)
    if q.ndim > 4:
        raise ValueError(f"q has {q.ndim} dimensions; reshape it to (B, H, L, D).")
    q, k, v = four_dimensional(q), four_dimensional(k), four_dimensional(v)
    if enable_gqa:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    leading = torch.broadcast_shapes(q.shape[:2], k.shape[:2], v.shape[:2])
    q, k, v = (x if x.shape[:2] == leading else x.expand(*leading, -1, -1) for x in (q, k, v))
    mask = None if mask is None else four_dimensional(mask)
    return Problem(q, k, v, mask, bool(is_causal), q.shape[-1] ** -0.5 if scale is None else float(scale))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    """ValueError for what `attention` does not compute, for any number of dimensions from two."""
    if dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}: this attention has no dropout; pass dropout_p=0.0.")
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; cast it to float16, bfloat16, float32 or float64.")
    if q.ndim < 2:
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
    leading = leading_shape(q, k, v, enable_gqa)
    if mask is None:
        return
    if is_causal:
        raise ValueError("is_causal is True beside attn_mask; put the causal mask into attn_mask.")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask has dtype {mask.dtype}; cast it to bool or to the dtype of q.")
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device} and q on {q.device}; move them to one device.")
    shape = (*[1] * (4 - q.ndim), *leading, q.shape[-2], k.shape[-2])
    extra = len(shape) - mask.ndim
    if extra < 0 or any(m not in (1, s) for m, s in zip(mask.shape, shape[extra:], strict=True)):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}; pass one that broadcasts to {shape}.")


def four_dimensional(x: Tensor) -> Tensor:
    for _ in range(4 - x.ndim):
        x = x.unsqueeze(0)
    return x


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Grouped queries: head h of q sees head h // (num_heads / heads of x)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def leading_shape(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The dimensions before (L, D) that q, k and v broadcast to."""
    leading = [tuple(x.shape[:-2]) for x in (q, k, v)]
    if enable_gqa and q.ndim > 2:
        num_heads = q.shape[-3]
        for name, x in (("k", k), ("v", v)):
            if x.shape[-3] == 0 or num_heads % x.shape[-3]:
                raise ValueError(
                    f"{name} has {x.shape[-3]} heads, no divisor of q's {num_heads}; pass a divisor."
                )
        leading = [(*shape[:-1], num_heads) for shape in leading]
    try:
        return tuple(torch.broadcast_shapes(*leading))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v have shapes {shapes}, whose (B, H) do not broadcast; pass equal ones or enable_gqa=True."
        ) from error


def autocast(x: Tensor) -> Tensor:
    """A floating tensor in the dtype of an enabled autocast, as torch's operator takes it; float64 stays."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
