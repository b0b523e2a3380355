"""Frechet distance between Gaussians fitted to two sets of features, in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed
from torch import Tensor

TOLERANCE = 1e-6
INFINITY_POINTS, INFINITY_SEED, INFINITY_RATIO = 15, 0, 20


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
        x = features.double().cpu() if features.device.type == "mps" else features
        mean = x.mean(0, dtype=torch.float64)
        return cls(len(x), mean, rows=torch.sub(x, mean).div_((len(x) - 1) ** 0.5))

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
        if self.rows is None or "matrix" in vars(self):
            return float(self.matrix.trace())
        return float(self.rows.square().sum())

    @cached_property
    def root(self) -> Tensor:
        """L (D, D) with L L^T the covariance: Cholesky, or the eigenvectors where it is singular."""
        lower, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info) == 0:
            return lower
        values, vectors = torch.linalg.eigh(self.matrix)
        return vectors * _nonnegative(values).sqrt()


class Accumulator:
    """Mean and covariance of features that arrive in pieces, without keeping them: float64, (D, D) state.

    Sums are taken about the mean of the first piece and merged by the formula of Chan, Golub and LeVeque 1979, so a
    large common offset costs no digits and the split into pieces, or processes, does not matter.
    """

    def __init__(self) -> None:
        self.n, self.mean, self.scatter = 0, torch.empty(0), torch.empty(0)

    def update(self, features: Tensor) -> None:
        """Add features (N, D). Raises ValueError if one is not finite or D differs."""
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError(f"features must be finite and (N, D), not {tuple(features.shape)}")
        if len(features) == 0:
            return
        x = as_float64(features)
        mean = x.mean(0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: "Accumulator") -> None:
        """Add what another one has seen."""
        self._merge(other.n, other.mean, other.scatter)

    def all_reduce(self) -> None:
        """Make every process of torch.distributed hold what all of them have seen: sums, never averages."""
        parts: list[Accumulator] = [Accumulator()] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self)
        self.n, self.mean, self.scatter = 0, torch.empty(0), torch.empty(0)
        for part in parts:
            self.merge(part)

    def moments(self) -> Moments:
        """Raises ValueError below 2 features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, not {self.n}")
        return Moments(self.n, self.mean, covariance=self.scatter / (self.n - 1))

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if n == 0:
            return
        if self.n == 0:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        if mean.shape != self.mean.shape:
            raise ValueError(
                f"features of {len(self.mean)} and of {len(mean)} dimensions have no common mean"
            )
        step, total = mean - self.mean, self.n + n
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total


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


def finite_sample_bias(covariance: Tensor, n: int, n_ref: int | None = None) -> float:
    """Expected Frechet distance, to first order, between n samples and the same distribution's exact moments.

    (1/n) [ (5/4) sum_i l_i + (1/2) sum_ij l_i l_j / (l_i + l_j) ] with l the eigenvalues of `covariance` (D, D); with
    a reference of n_ref samples 1/n + 1/n_ref takes the place of 1/n. Why FID falls as n grows; from the
    second-order expansion of the distance around equal moments; tested against simulation.
    """
    values = _nonnegative(torch.linalg.eigvalsh(as_float64(covariance)))
    values = values[values > 0]
    pairs = values[:, None] * values / (values[:, None] + values)
    rate = 1 / n + (0 if n_ref is None else 1 / n_ref)
    return float(1.25 * values.sum() + 0.5 * pairs.sum()) * rate


def frechet_infinity(features: Tensor, reference: Moments, *, points: int = INFINITY_POINTS) -> float:
    """Frechet distance extrapolated to infinitely many generated pictures (FID-infinity, Chong & Forsyth 2020).

    Distances of `points` random subsets of features (N, D), of N/5 to N rows, are fitted by a line in 1/N, whose
    value at 0 is returned. Subsets come from a fixed seed. The line holds where every subset is several times D:
    raises ValueError where N < 20 D (at N = 5 D, equal unit Gaussians in 64 dimensions would come out at -1.1).
    """
    n, d = features.shape
    if n < INFINITY_RATIO * d:
        raise ValueError(
            f"{n} pictures in {d} dimensions: the extrapolation needs at least {INFINITY_RATIO * d}"
        )
    draw = torch.Generator().manual_seed(INFINITY_SEED)
    sizes = torch.linspace(n / 5, n, points).round().long().tolist()
    values = [
        frechet_distance(reference, Moments.of(features[torch.randperm(n, generator=draw)[:size]]))
        for size in sizes
    ]
    line = torch.stack([torch.ones(points), 1 / torch.tensor(sizes)], dim=1).double()
    solution = torch.linalg.lstsq(line, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return float(solution[0, 0])


def as_float64(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _nonnegative(values: Tensor) -> Tensor:
    """Eigenvalues of a covariance, rounding below zero cut off; ValueError if it is more than rounding."""
    if not values.min() >= -TOLERANCE * values.abs().max():
        raise ValueError(f"a covariance has the eigenvalue {float(values.min())}: it is not positive")
    return values.clamp_min(0)
