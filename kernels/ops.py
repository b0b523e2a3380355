"""The back ends as opaque torch operators: torch.compile sees one node, and no Python loop of a back end.

A custom operator has no forward-mode formula and would return a zero tangent without a word: call these only from
the autograd functions of `autograd.py`.
"""

import torch
from torch import Tensor

from .backends import select
from .naive import lse_dtype


@torch.library.custom_op("fewstep::attention_forward", mutates_args=())
def attention_forward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """O, tO, LSE; tO is empty if there is no tangent."""
    module = select(backend, q, v)
    out, tangent, lse = module.forward(q, k, v, tq, tk, tv, bias, tbias, is_causal, scale)
    return out, q.new_empty(0) if tangent is None else tangent, lse


@attention_forward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    has_tangent = any(t is not None for t in (tq, tk, tv, tbias))
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    return out, torch.empty_like(out) if has_tangent else q.new_empty(0), lse


@torch.library.custom_op("fewstep::attention_backward", mutates_args=())
def attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dBias; dBias is empty unless `bias_grad`."""
    module = select(backend, q, v)
    dq, dk, dv, dbias = module.backward(grad_out, q, k, v, bias, out, lse, is_causal, scale, bias_grad)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@attention_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias
