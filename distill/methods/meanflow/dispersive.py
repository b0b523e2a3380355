"""Dispersive regularisers: representations of different samples are driven apart."""

import torch
from torch import Tensor

from .settings import Dispersion


def dispersive(kind: Dispersion, h: Tensor, tau: float = 1.0) -> Tensor:
    """log mean_ij exp(-d_ij / tau) over all pairs of rows, the diagonal and both orders included; h (B, ...).

    infonce_l2  d_ij = |h_i - h_j|^2 / F, F elements a row ("Diffuse and Disperse", arXiv 2506.09027)
    mp1         d_ij = |h_i - h_j|^2 / max_ij |h_i - h_j|^2: the scale of h is of no account (LogSSim/MP1)

    In float32; between log(1/B) and 0, which equal rows reach.
    """
    h = h.flatten(1).float()
    h = h - h.mean(0)  # distances keep their digits
    squares = h.square().sum(1)
    d = (squares[:, None] + squares - 2 * h @ h.T).clamp(min=0)
    d = d / (h.shape[1] if kind == "infonce_l2" else d.max().clamp(min=torch.finfo(d.dtype).tiny))
    return (-d / tau).exp().mean().log()
