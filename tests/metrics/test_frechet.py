"""Frechet distance: closed forms and the values recorded for rank-deficient sets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.metrics.frechet import (
    Accumulator,
    Moments,
    finite_sample_bias,
    frechet_distance,
    frechet_infinity,
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_features_of_the_caller_stay_as_they_are(dtype: torch.dtype) -> None:
    features = torch.randn(6, 3).to(dtype)
    before = features.clone()
    Moments.of(features)
    assert torch.equal(features, before)


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


@pytest.mark.parametrize("sizes", [[40], [1, 39], [7, 0, 30, 3]])
def test_pieces_give_the_moments_of_the_whole(sizes: list[int]) -> None:
    x = torch.randn(40, 6).double() @ torch.randn(6, 6).double() + 50
    one, other = Accumulator(), Accumulator()
    for i, piece in enumerate(x.split(sizes)):
        (one if i % 2 else other).update(piece)
    one.merge(other)
    whole, merged = Moments.of(x), one.moments()
    assert merged.n == 40
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(merged.matrix, whole.matrix, rtol=1e-10, atol=1e-12)
    y = Moments.of(torch.randn(50, 6).double())
    assert frechet_distance(merged, y) == pytest.approx(frechet_distance(whole, y), rel=1e-10)


def test_a_large_offset_does_not_depend_on_the_pieces() -> None:
    x = torch.randn(400, 3).double() * 0.01 + 100
    values = []
    for size in (400, 64, 7):
        pieces = Accumulator()
        for piece in x.split(size):
            pieces.update(piece)
        values.append(frechet_distance(pieces.moments(), Moments.of(x + 1e-4)))
    assert values == pytest.approx([values[0]] * 3, rel=1e-6) and values[0] == pytest.approx(3e-8, rel=1e-3)


def test_unfit_pieces_are_refused() -> None:
    pieces = Accumulator()
    with pytest.raises(ValueError, match="at least 2"):
        pieces.moments()
    pieces.update(torch.randn(5, 4))
    with pytest.raises(ValueError, match="4 and of 3"):
        pieces.update(torch.randn(5, 3))
    with pytest.raises(ValueError, match="finite"):
        pieces.update(torch.full((5, 4), torch.nan))


SHARE = """
import sys
import torch
from fewstep.distill.metrics.frechet import Accumulator
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = torch.randn(41, 5, generator=torch.Generator().manual_seed(0)).double() + 10
pieces = Accumulator()
pieces.update(x[:30] if rank == 0 else x[30:])
pieces.all_reduce()
moments = pieces.moments()
torch.save([moments.n, moments.mean, moments.matrix], f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_processes_with_unequal_shares_sum_to_the_whole(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", SHARE, str(r), str(tmp_path)]) for r in (0, 1)]
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    whole = Moments.of(torch.randn(41, 5, generator=torch.Generator().manual_seed(0)).double() + 10)
    for rank in (0, 1):
        n, mean, matrix = torch.load(tmp_path / f"{rank}.pt")
        assert n == 41
        torch.testing.assert_close(mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(matrix, whole.matrix, rtol=1e-10, atol=1e-12)


def test_bias_formula_of_unit_covariance() -> None:
    d = 16
    assert finite_sample_bias(torch.eye(d), 2000) == pytest.approx((d + d * (d + 1) / 4) / 2000)
    assert finite_sample_bias(torch.eye(d), 2000, 500) == pytest.approx(
        (d + d * (d + 1) / 4) * (1 / 2000 + 1 / 500)
    )


@pytest.mark.parametrize("spectrum", ["flat", "falling"])
def test_finite_sample_bias_follows_its_formula(spectrum: str) -> None:
    d, n = 16, 2000
    scale = torch.ones(d).double() if spectrum == "flat" else (1 / torch.arange(1, d + 1).double()).sqrt()
    draw = torch.Generator().manual_seed(0)
    exact = Moments(n, torch.zeros(d).double(), covariance=torch.diag(scale**2))

    def sample() -> Moments:
        return Moments.of(torch.randn(n, d, generator=draw).double() * scale)

    for expected, distances in (
        (finite_sample_bias(exact.matrix, n), [frechet_distance(sample(), exact) for _ in range(20)]),
        (finite_sample_bias(exact.matrix, n, n), [frechet_distance(sample(), sample()) for _ in range(20)]),
    ):
        values = torch.tensor(distances)
        assert abs(values.mean() - expected) < 3 * values.std() / 20**0.5


def test_infinity_takes_the_bias_away() -> None:
    """Covariances 1.44 and 1 in 12 dimensions are 0.48 apart."""
    d, n, repeats = 12, 600, 12
    draw = torch.Generator().manual_seed(1)
    exact = Moments(n, torch.zeros(d).double(), covariance=torch.eye(d).double())
    sets = [torch.randn(n, d, generator=draw).double() * 1.2 for _ in range(repeats)]
    errors = torch.tensor(
        [[frechet_distance(Moments.of(x), exact), frechet_infinity(x, exact)] for x in sets]
    ) - torch.tensor(0.48)
    of_mean = errors.std(0) / repeats**0.5
    assert errors[:, 0].mean() > 5 * of_mean[0]
    assert errors[:, 1].mean().abs() < 3 * of_mean[1] < 0.06
    with pytest.raises(ValueError, match="at least 240"):
        frechet_infinity(sets[0][:239], exact)
