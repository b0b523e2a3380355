"""Kernel inception distance in any features: unbiased in the number of pictures, so fit for small sets."""

from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor

DEFINITION = "unbiased MMD^2 of whole sets, kernel (x.y/d + 1)^3, not x1000"


def kid(x: Tensor, y: Tensor, *, block: int = 4096) -> float:
    """Unbiased MMD^2 between features x (N, D) and y (M, D) with k(x, y) = (x.y / D + 1)^3; may be negative.

    The plain value, not x1000. Whole sets in float64, kernel matrices in pieces of block x block. Binkowski
    et al. 2018, with sets of different sizes allowed. Raises ValueError below 2 pictures a side, on
    features that are not finite and on differing dimensions.
    """
    return within(x, block=block) + within(y, block=block) - 2 * between(x, y, block=block)


def kid_over(x: Tensor, parts: Sequence[Tensor], *, block: int = 4096) -> tuple[float, float | None]:
    """Mean and standard deviation (ddof 1; None for one part) of the KID of each part to x.

    Parts are the features of different seeds, or disjoint blocks of one set (`y.split(size)`).
    """
    own = within(x, block=block)
    return mean_sd([own + within(y, block=block) - 2 * between(x, y, block=block) for y in parts])


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation with ddof 1, which one value does not have."""
    return mean(values), stdev(values) if len(values) > 1 else None


def within(x: Tensor, *, block: int = 4096) -> float:
    """Mean kernel value over ordered pairs of different rows of x (N, D)."""
    _check(x)
    diagonal = (x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum()
    total, n = -diagonal, len(x)
    pieces = x.split(block)
    for i, piece in enumerate(pieces):  # the kernel is symmetric: pairs of two pieces count twice
        total += _kernel_sum(piece, piece, block)
        for other in pieces[i + 1 :]:
            total += 2 * _kernel_sum(piece, other, block)
    return float(total / (n * (n - 1)))


def between(x: Tensor, y: Tensor, *, block: int = 4096) -> float:
    """Mean kernel value over pairs of a row of x (N, D) and a row of y (M, D)."""
    _check(x)
    _check(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions have no distance")
    return float(_kernel_sum(x, y, block) / (len(x) * len(y)))


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a in x.split(block):
        for b in y.split(block):
            total += (a.double() @ b.double().T / x.shape[1] + 1).pow_(3).sum()
    return total


def _check(x: Tensor) -> None:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"KID needs at least 2 feature vectors (N, D) a side, not {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features are not finite")
