"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of two feature sets.

Both estimate where a distribution has mass by balls around its samples that reach to their k-th neighbour. All four
depend on how many samples a side has: compare only equal numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5


def manifold(
    real: Tensor,
    generated: Tensor,
    *,
    neighbours: tuple[int, int] = (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS),
    reach: Tensor | None = None,
    block: int = 2048,
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage of real (N, D) and generated (M, D).

    precision  share of generated samples within some real ball; recall: of real ones within some generated ball
               (improved precision and recall, eq. 1 and 2, k = 3)
    density    mean number of real balls around a generated sample over k; coverage: share of real balls that hold
               one (Naeem et al., eq. 3 and 4, k = 5); density may exceed 1

    neighbours: k of the first and of the last two. reach: radii(real, neighbours) where they are at hand. All come
    from the same distances, in pieces of `block` rows.

    Raises ValueError on features that are not finite, differ in dimension, or are no more than a k.
    """
    _check(real, generated, neighbours)
    precise_reach, covered_reach = radii(real, neighbours, block=block) if reach is None else reach
    own_reach = radii(generated, neighbours[:1], block=block)[0]
    centres = real.double()
    precise, inside = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full_like(covered_reach, torch.inf)
    for points, own in zip(generated.split(block), own_reach.split(block), strict=True):
        distance = torch.cdist(points.double(), centres)
        precise += int((distance <= precise_reach).any(1).sum())
        inside += int((distance <= covered_reach).sum())
        recalled |= (distance <= own[:, None]).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    covered = (nearest <= covered_reach).double().mean()
    density = inside / len(generated) / neighbours[1]
    return precise / len(generated), float(recalled.double().mean()), density, float(covered)


def radii(x: Tensor, neighbours: Sequence[int], *, block: int = 2048) -> Tensor:
    """Distances of each row of x (N, D) to its nearest other rows of these ranks: float64 (len(neighbours), N)."""
    parts = []
    others = x.double()
    for first in range(0, len(x), block):
        distance = torch.cdist(others[first : first + block], others)
        rows = torch.arange(len(distance))
        distance[rows, first + rows] = torch.inf
        parts.append(torch.stack([distance.kthvalue(k, dim=1).values for k in neighbours]))
    return torch.cat(parts, dim=1)


def _check(real: Tensor, generated: Tensor, neighbours: Sequence[int]) -> None:
    most = max(neighbours)
    for x in (real, generated):
        if x.ndim != 2 or len(x) <= most:
            raise ValueError(f"{most} neighbours need more feature vectors (N, D) than {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("features are not finite")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of {real.shape[1]} and of {generated.shape[1]} dimensions have no distance"
        )
