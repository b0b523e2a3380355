"""Distances between predictions."""

from typing import Literal

from torch import Tensor

Distance = Literal["huber", "l2"]


def distance(
    kind: Distance, prediction: Tensor, target: Tensor, huber_c: float = 1e-3, weights: Tensor | None = None
) -> Tensor:
    """Mean over all elements, in float32: pseudo-Huber sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 7), or d^2.

    prediction, target (B, ...); weights (B,) multiply each sample's mean.
    """
    d = prediction.float() - target.float()
    values = (d.square() + huber_c**2).sqrt() - huber_c if kind == "huber" else d.square()
    if weights is None:
        return values.mean()
    return (values.flatten(1).mean(1) * weights.float()).mean()
