"""Frechet distance between Gaussians fitted to two sets of features, in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and covariance of n samples, ddof = 1.

    The covariance is `covariance` (D, D), or rows^T rows with `rows` (k, D): then it is never squared for the
    small-sample path, which keeps that path exact.
    """

    n: int
    mean: Tensor
    rows: Tensor | None = None
    covariance: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features (N, D). Raises ValueError if N < 2 or a feature is not finite."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"a covariance needs at least 2 feature vectors (N, D), not {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features are not finite")
        x = features.double()
        mean = x.mean(0)
        return cls(len(x), mean, rows=(x - mean) / (len(x) - 1) ** 0.5)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """A (k, D) with k <= D and A^T A the covariance."""
        assert self.rows is not None
        return self.rows if len(self.rows) <= self.dim else torch.linalg.qr(self.rows, mode="r").R

    @cached_property
    def matrix(self) -> Tensor:
        """The covariance, (D, D)."""
        if self.covariance is not None:
            return self.covariance.double()
        assert self.rows is not None
        return self.rows.T @ self.rows

    @cached_property
    def trace(self) -> float:
        return float(self.matrix.trace() if self.rows is None else self.rows.square().sum())

    @cached_property
    def root(self) -> Tensor:
        """L (D, D) with L L^T the covariance: Cholesky, or the eigenvectors where it is singular."""
        lower, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info) == 0:
            return lower
        values, vectors = torch.linalg.eigh(self.matrix)
        return vectors * _nonnegative(values).sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), label FD-<extractor>; it falls with N.

    With samples at hand and n <= D on a side, the last trace is the nuclear norm of A B^T (S_a = A^T A,
    S_b = B^T B), by singular values; otherwise the sum of square roots of eig(L^T S_b L), S_a = L L^T.
    Raises ValueError on differing dimensions, a covariance that is not positive, or a negative distance.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and of {b.dim} dimensions have no distance")
    if a.rows is not None and b.rows is not None and min(a.n, b.n) <= a.dim:
        cross = float(torch.linalg.svdvals(a.factor @ b.factor.T).sum())
    else:
        product = a.root.T @ b.matrix @ a.root
        cross = float(_nonnegative(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum())
    scale = a.trace + b.trace
    distance = float((a.mean - b.mean).double().square().sum()) + scale - 2 * cross
    if not distance >= -TOLERANCE * scale:
        raise ValueError(f"Frechet distance came out as {distance}: the covariances are inconsistent")
    return max(distance, 0.0)


def _nonnegative(values: Tensor) -> Tensor:
    """Eigenvalues of a covariance, rounding below zero cut off; ValueError if it is more than rounding."""
    if not values.min() >= -TOLERANCE * values.abs().max():
        raise ValueError(f"a covariance has the eigenvalue {float(values.min())}: it is not positive")
    return values.clamp_min(0)
