"""`attention` and `attention_jvp`: scaled dot product attention with a forward-mode derivative."""

import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from .arguments import autocast, check, check_tangent, four_dimensional, normalise, repeat_heads
from .autograd import differentiable, launch
from .backends import requested


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V, as `scaled_dot_product_attention`, with a tangent (arXiv 2410.11081, appendix F).

    q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv) -> (B, H, Lq, Dv), any strides; scale defaults to D^-1/2. A
    boolean attn_mask shows where True, a floating one is added after scaling; both broadcast to (B, H, Lq, Lk).
    Fully masked rows give 0. Works under autograd, autocast, torch.func.jvp, dual numbers, vmap and torch.compile;
    without forward mode and without `use_backend` it is torch's own operator, which takes more dimensions. Raises
    ValueError for arguments that do not fit, for dropout and other dtypes, and NotImplementedError for jvp of jvp and
    for a gradient through the tangent.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    attn_mask = None if attn_mask is None else autocast(attn_mask)
    if forward_ad._current_level < 0 and requested() == "auto":
        check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out, _ = differentiable(normalise(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    return out.reshape(*leading(q, out), *out.shape[-2:])


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    t_attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(O, tO, LSE) of attention in one pass: tO = H V + P tV - diag(rowsum H) O, H = P * tS (arXiv 2410.11081, app. F).

    Arguments as for `attention`; tq, tk, tv and t_attn_mask are the tangents of q, k, v and a floating attn_mask, in
    their shapes and dtype, or None for zero, which saves products. LSE (B, H, Lq) is the natural logarithm of the
    row sums, -inf for a fully masked row, in float32 (float64 for float64). O is differentiable in reverse; LSE is
    not, and a gradient through tO raises NotImplementedError. Autocast changes nothing here. Raises ValueError as
    `attention` does.
    """
    tangents = [check_tangent(name, t, x) for name, t, x in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v))]
    if t_attn_mask is not None and (attn_mask is None or not attn_mask.is_floating_point()):
        raise ValueError("t_attn_mask is given without a floating attn_mask; leave it out.")
    tbias = None if attn_mask is None else check_tangent("t_attn_mask", t_attn_mask, attn_mask)
    problem = normalise(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    full = []
    for t, primal in zip(tangents, problem[:3], strict=True):
        if t is not None:
            t = four_dimensional(t)
            t = (repeat_heads(t, primal.shape[1]) if enable_gqa else t).expand(primal.shape)
        full.append(t)
    tbias = None if tbias is None else four_dimensional(tbias)
    out, tangent, lse = launch(problem, (full[0], full[1], full[2], tbias))
    if tangent is None:
        tangent = out.new_zeros(out.shape)
    shape = leading(q, out)
    return (
        out.reshape(*shape, *out.shape[-2:]),
        tangent.reshape(*shape, *out.shape[-2:]),
        lse.reshape(*shape, lse.shape[-1]),
    )


def leading(q: Tensor, out: Tensor) -> tuple[int, ...]:
    """The dimensions before (L, D) that the caller's tensors have: none, (H,) or (B, H)."""
    return tuple(out.shape[4 - q.ndim : 2])
