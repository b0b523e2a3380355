"""Rewards weighted by their own uncertainty (Ctrl-U, arXiv 2410.11236): two views of one sample judged by one model."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_uncertainty(primary: Tensor, auxiliary: Tensor) -> Tensor:
    """KL(softmax(auxiliary) || softmax(primary)) summed over the classes: (B, K, ...) -> (B, ...)."""
    kind = torch.promote_types(primary.dtype, torch.float32)
    log_primary, log_auxiliary = (F.log_softmax(y.to(kind), dim=1) for y in (primary, auxiliary))
    return (log_auxiliary.exp() * (log_auxiliary - log_primary)).sum(1)


def uncertainty_weighted(
    cost: Tensor, uncertainty: Tensor, *, detach: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """mean of cost exp(-U), and mean of U: over the samples of `mask` (B,) where one is given, 0 where it is empty.

    cost >= 0 and U (B, ...). The caller adds weight * first + lambda * second. With `detach` exp(-U) is taken as a
    number: a large cost then no longer pushes U up.
    """
    weight = (-uncertainty).exp()
    rectified = cost * (weight.detach() if detach else weight)
    return masked_mean(rectified, mask), masked_mean(uncertainty, mask)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    per_row = values.flatten(1).mean(1) if values.ndim > 1 else values
    inside = mask.to(values.dtype)
    return (inside * per_row).sum() / (inside.sum() + 1e-10)
