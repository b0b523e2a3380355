"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of two feature sets.

Both estimate where a distribution has mass by balls around its samples that reach to their k-th neighbour. All four
depend on how many samples a side has: compare only equal numbers.
"""

import torch
from torch import Tensor

PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbours: int = PRECISION_NEIGHBOURS, block: int = 2048
) -> tuple[float, float]:
    """Share of generated samples within some real ball, and of real samples within some generated ball.

    real (N, D), generated (M, D). Improved precision and recall, eq. 1 and 2, k = 3. Raises ValueError on features
    that are not finite, differ in dimension, or are no more than `neighbours`.
    """
    _check(real, generated, neighbours)
    precise = _inside(generated, real, radii(real, neighbours, block=block), block).bool()
    recalled = _inside(real, generated, radii(generated, neighbours, block=block), block).bool()
    return float(precise.double().mean()), float(recalled.double().mean())


def density_coverage(
    real: Tensor, generated: Tensor, *, neighbours: int = COVERAGE_NEIGHBOURS, block: int = 2048
) -> tuple[float, float]:
    """Mean number of real balls around a generated sample over k, and the share of real balls that hold one.

    real (N, D), generated (M, D). Naeem et al., eq. 3 and 4, k = 5: density may exceed 1; coverage is at most 1.
    Errors as in `precision_recall`.
    """
    _check(real, generated, neighbours)
    reach = radii(real, neighbours, block=block)
    counts = _inside(generated, real, reach, block)
    covered = [
        (torch.cdist(balls.double(), generated.double()).amin(1) <= r)
        for balls, r in zip(real.split(block), reach.split(block), strict=True)
    ]
    return float(counts.double().mean() / neighbours), float(torch.cat(covered).double().mean())


def radii(x: Tensor, neighbours: int, *, block: int = 2048) -> Tensor:
    """Distance of each row of x (N, D) to its `neighbours`-th nearest other row: float64 (N,)."""
    parts = []
    for first in range(0, len(x), block):
        rows = x[first : first + block].double()
        distance = torch.cdist(rows, x.double())
        distance[torch.arange(len(rows)), torch.arange(first, first + len(rows))] = torch.inf
        parts.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(parts)


def _inside(points: Tensor, centres: Tensor, reach: Tensor, block: int) -> Tensor:
    """How many of the balls (centres, reach) each point lies in: int64 (N,)."""
    parts = [(torch.cdist(p.double(), centres.double()) <= reach).sum(1) for p in points.split(block)]
    return torch.cat(parts)


def _check(real: Tensor, generated: Tensor, neighbours: int) -> None:
    for x in (real, generated):
        if x.ndim != 2 or len(x) <= neighbours:
            raise ValueError(
                f"{neighbours} neighbours need more feature vectors (N, D) than {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError("features are not finite")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of {real.shape[1]} and of {generated.shape[1]} dimensions have no distance"
        )
