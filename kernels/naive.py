"""Attention and its derivatives written out in float64: the truth that the other back ends are tested against."""

import torch
from torch import Tensor


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
    """O = P V and tO = H V + P tV - diag(rowsum H) O, H = P * tS (arXiv 2410.11081, appendix F).

    Computed in float64 from full (B, H, Lq, Lk) matrices. Returns O and tO (None without tangents) in q's dtype
    and LSE (B, H, Lq) in float32, or float64 for float64.
    """
    p, lse, hidden = probabilities(q, k, bias, is_causal, scale)
    values = v.double()
    out = p @ values
    if tq is None and tk is None and tv is None and tbias is None:
        return out.to(q.dtype), None, lse.to(lse_dtype(q))
    ts = torch.zeros_like(p)
    if tq is not None:
        ts = ts + scale * (tq.double() @ k.double().mT)
    if tk is not None:
        ts = ts + scale * (q.double() @ tk.double().mT)
    if tbias is not None:
        ts = ts + tbias.double()
    h = p * ts.masked_fill(hidden, 0.0)
    tangent = h @ values - h.sum(-1, keepdim=True) * out
    if tv is not None:
        tangent = tangent + p @ tv.double()
    return out.to(q.dtype), tangent.to(q.dtype), lse.to(lse_dtype(q))


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
    """dQ, dK, dV and, if `bias_grad`, dBias of sum(grad_out * O): dS = P * (dP - rowsum(P * dP)), dP = dO V^T."""
    p, _, hidden = probabilities(q, k, bias, is_causal, scale)
    do = grad_out.double()
    dp = (do @ v.double().mT).masked_fill(hidden, 0.0)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    grads = scale * (ds @ k.double()), scale * (ds.mT @ q.double()), p.mT @ do
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and bias_grad else None
    return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype), dbias


def probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P (B, H, Lq, Lk), LSE (B, H, Lq) and the mask of the pairs that P leaves out."""
    s = scale * (q.double() @ k.double().mT)
    if is_causal:
        s = s.masked_fill(s.new_ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if bias is not None:
        s = s.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else s + bias.double()
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    dead = (lse == -torch.inf).unsqueeze(-1)
    return s.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0), lse, s == -torch.inf


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
