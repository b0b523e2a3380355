"""Frechet distance: closed forms and the values recorded for rank-deficient sets."""

import numpy as np
import pytest
import torch
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from scipy.linalg import sqrtm

E = torch.eye(5, dtype=torch.float64)
FEW_X, FEW_Y = E[:3], torch.stack([E[3], E[1], E[4], E[0] + E[1]])


def gaussian(mean: list[float], covariance: list[list[float]]) -> Moments:
    return Moments(100, torch.tensor(mean), covariance=torch.tensor(covariance))


def fd(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


def test_two_by_two_reference_value() -> None:
    a = gaussian([1.0, 0.0], [[2.0, 1.0], [1.0, 2.0]])
    b = gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 3.0]])
    assert frechet_distance(a, b) == pytest.approx(2.5166852264521173, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(2.5166852264521173, abs=1e-12)


def test_diagonal_covariances() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 2.0])
    x, y = (gaussian([m, 0.0, 0.0], torch.diag(d).tolist()) for m, d in ((0.0, a), (2.0, b)))
    assert frechet_distance(x, y) == pytest.approx(4 + float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-6)


def test_rank_deficient_reference_value_on_both_paths() -> None:
    assert fd(FEW_X, FEW_Y) == pytest.approx(1.305411876686009, abs=1e-12)
    x, y = (Moments(m.n, m.mean, covariance=m.matrix) for m in map(Moments.of, (FEW_X, FEW_Y)))
    assert frechet_distance(x, y) == pytest.approx(1.305411876686009, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (60, 9), (9, 60), (8, 7)])
def test_agrees_with_scipy_sqrtm_for_any_sizes(n: int, m: int) -> None:
    x, y = torch.randn(n, 12).double() @ torch.randn(12, 12).double(), 1 + torch.randn(m, 12).double()
    a, b = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    cross = sqrtm(a @ b + (0 if min(n, m) > 12 else 1e-14) * np.eye(12)).real.trace()
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + a.trace() + b.trace() - 2 * cross
    assert fd(x, y) == pytest.approx(expected, rel=1e-5 if min(n, m) <= 12 else 1e-10)


@pytest.mark.parametrize("n", [6, 40])
def test_invariants(n: int) -> None:
    x, y = torch.randn(n, 8).double(), torch.randn(n + 3, 8).double() * 2 + 1
    rotation, _ = torch.linalg.qr(torch.randn(8, 8).double())
    assert fd(x, x) <= 1e-9 * Moments.of(x).trace
    assert fd(x, y) == pytest.approx(fd(y, x), rel=1e-10)
    assert fd(3 * x @ rotation + 5, 3 * y @ rotation + 5) == pytest.approx(9 * fd(x, y), rel=1e-10)


def test_a_large_common_offset_costs_no_digits() -> None:
    x, y = torch.randn(40, 4).double() * 0.01, torch.randn(40, 4).double() * 0.02
    assert fd(x + 100, y + 100) == pytest.approx(fd(x, y), rel=1e-9)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(torch.ones(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="4 and of 5"):
        fd(torch.randn(9, 4), torch.randn(9, 5))
    with pytest.raises(ValueError, match="not positive"):
        frechet_distance(
            gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, -1.0]]), gaussian([0.0, 0.0], torch.eye(2).tolist())
        )


@pytest.mark.slow
def test_finite_sample_bias_follows_its_formula() -> None:
    """E FD ~ (d + d (d + 1) / 4) / N of N samples against exact statistics, unit covariance (first order)."""
    d, n = 16, 2000
    exact = Moments(n, torch.zeros(d).double(), covariance=torch.eye(d).double())
    values = torch.tensor(
        [frechet_distance(Moments.of(torch.randn(n, d).double()), exact) for _ in range(20)]
    )
    assert abs(values.mean() - (d + d * (d + 1) / 4) / n) < 3 * values.std() / 20**0.5
