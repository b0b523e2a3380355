"""Distances between predictions."""

from typing import Literal

from torch import Tensor

Distance = Literal["huber", "l2"]


def distance(kind: Distance, prediction: Tensor, target: Tensor, huber_c: float = 1e-3) -> Tensor:
    """Mean over all elements, in float32: pseudo-Huber sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 7), or d^2."""
    d = prediction.float() - target.float()
    if kind == "huber":
        return ((d.square() + huber_c**2).sqrt() - huber_c).mean()
    return d.square().mean()
