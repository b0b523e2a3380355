"""Distances, scale and early levels of latent consistency training against recorded values; outliers."""

import math
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.losses import robust
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.methods.consistency_training.curriculum import (
    doubling,
    early_level,
    lognormal_bins,
    robust_scale,
)
from fewstep.distill.methods.consistency_training.lct import early_diffusion
from torch import Tensor

from .lct_parts import SCALES

C = 0.03456
ROWS = [  # sqrt(m), cauchy, mean_huber, geman_mcclure, d cauchy / d sqrt(m), at c = 0.03456
    (0.001, 0.00041853, 0.00001446, 0.00041853, 0.836895),
    (0.01, 0.04100973, 0.00141768, 0.04100399, 8.036043),
    (0.1, 1.64600602, 0.07124356, 1.35340208, 16.143630),
    (1.0, 6.03935543, 0.96603702, 1.99049028, 1.995234),
    (10.0, 10.64216356, 9.96549972, 1.99990445, 0.199995),
]
EARLY = [  # N, floor(0.75 N), pairs in S, largest sigma_hi, P(S), weights
    (11, 8, 2, 0.085087, 0.244370, 142.125, 3580.75),
    (21, 15, 5, 0.169753, 0.365946, 38.703, 25474.6),
    (41, 30, 10, 0.169753, 0.365946, 38.703, 76174.2),
    (641, 480, 160, 0.169753, 0.365946, 38.703, 231404.5),
]


def rho(kind: Any, root: float, c: float = C) -> Tensor:
    return robust(kind, torch.tensor([root**2], dtype=torch.float64), c)


def slope(kind: Any, root: float, c: float = C) -> float:
    r = torch.tensor([root], requires_grad=True)
    robust(kind, r.square(), c).sum().backward()
    assert r.grad is not None
    return r.grad.item()


@pytest.mark.parametrize(("root", "cauchy", "huber", "geman", "gradient"), ROWS)
def test_recorded_distances(root: float, cauchy: float, huber: float, geman: float, gradient: float) -> None:
    assert rho("cauchy", root).item() == pytest.approx(cauchy, rel=1e-6, abs=6e-9)
    assert rho("mean_huber", root).item() == pytest.approx(huber, rel=1e-5, abs=6e-9)
    assert rho("geman_mcclure", root).item() == pytest.approx(geman, rel=1e-6, abs=6e-9)
    assert slope("cauchy", root) == pytest.approx(gradient, rel=2e-6)
    assert rho("cauchy", root).item() == pytest.approx(
        math.log(root**2 / 2 + C**2) - 2 * math.log(C), rel=1e-5
    )


def test_slopes_fall_beyond_their_tops() -> None:
    """That of Cauchy is 1 / (sqrt(2) c) at sqrt(2) c and about 2 / r far beyond, of Geman-McClure 16 c^2 / r^3, of
    Huber 1."""
    top = 2**0.5 * C
    assert slope("cauchy", top) == pytest.approx(1 / (2**0.5 * C), rel=1e-6)
    assert slope("cauchy", 0.9 * top) < slope("cauchy", top) > slope("cauchy", 1.1 * top)
    assert slope("cauchy", 30.0) == pytest.approx(2 / 30, rel=1e-5)
    assert slope("geman_mcclure", 3.0) == pytest.approx(16 * C**2 / 27, rel=2e-3)
    assert slope("mean_huber", 30.0) == pytest.approx(1, rel=1e-5)
    assert rho("cauchy", 1e-5).item() == pytest.approx(1e-10 / (2 * C**2), rel=1e-6)


def test_the_smallest_scale_in_float32() -> None:
    """c^2 is 6.4e-8 in the last stage: in bfloat16, or as the logarithm of a sum, little would be left."""
    c = SCALES[641]
    assert rho("cauchy", 1e-3, c).dtype == torch.float32
    assert rho("cauchy", 1e-3, c).item() == pytest.approx(math.log1p(1e-6 / (2 * c**2)), rel=1e-6)
    assert rho("cauchy", 1e-3, c).item() == pytest.approx(2.17, abs=5e-3)
    assert rho("cauchy", 1e-8, c).item() == pytest.approx(1e-16 / (2 * c**2), rel=1e-5)
    half = torch.tensor([1e-6], dtype=torch.bfloat16)
    assert robust("cauchy", half, c).item() == pytest.approx(math.log1p(half.item() / (2 * c**2)), rel=1e-6)
    for kind in ("cauchy", "geman_mcclure", "mean_huber"):
        m = torch.zeros(2, requires_grad=True)
        value = robust(kind, m, c)  # type: ignore[arg-type]
        value.sum().backward()
        assert value.tolist() == [0.0, 0.0] and m.grad is not None and m.grad.isfinite().all()
        assert slope(kind, 1e-9, c) == pytest.approx(0, abs=0.02)


def test_the_scale_follows_the_number_of_levels() -> None:
    """Of N - 1, not of N or of the iteration; the first stage has its own."""
    for points, c in SCALES.items():
        assert robust_scale(points, 10, 0.03456, -1.15, -0.85) == pytest.approx(c, rel=3e-6, abs=5e-9)
    assert math.exp(-1.15 * math.log(10) - 0.85) == pytest.approx(0.03025866, rel=1e-6)
    other = {
        9: 0.0345,
        17: 0.01762429,
        33: 0.00794195,
        65: 0.00357884,
        129: 0.00161272,
        257: 0.00072673,
        513: 0.00032748,
    }
    for points, c in other.items():
        assert robust_scale(points, 8, 0.0345, -1.15, -0.85) == pytest.approx(c, rel=2e-5)


def test_the_number_of_levels_has_seven_stages() -> None:
    known = {0: 11, 41_999: 11, 42_000: 21, 251_999: 321, 252_000: 641, 294_000: 641}
    for iteration, points in known.items():
        assert doubling(iteration, 294_000, 10, 640) == points
    starts = [k for k in range(1, 700) if doubling(k, 700, 10, 640) != doubling(k - 1, 700, 10, 640)]
    assert starts == [100, 200, 300, 400, 500, 600]


@pytest.mark.parametrize(("points", "first", "count", "largest", "share", "least", "most"), EARLY)
def test_early_pairs(
    points: int, first: int, count: int, largest: float, share: float, least: float, most: float
) -> None:
    sigmas = EDM().grid(points)
    level = early_level(sigmas, 0.75)
    falling = sigmas.flip(0)[first:-1]  # sigma_j of the pairs j >= floor(0.75 N), counted from the noisiest
    early = sigmas[1:] <= level
    assert int(early.sum()) == count == len(falling) and torch.equal(sigmas[1:][early].flip(0), falling)
    assert level == pytest.approx(largest, abs=5e-7)
    assert lognormal_bins(sigmas, -1.1, 2.0)[early].sum().item() == pytest.approx(share, abs=5e-7)
    weights = 1 / sigmas[1:][early].square() + 4
    assert weights.min().item() == pytest.approx(least, rel=2e-5)
    assert weights.max().item() == pytest.approx(most, rel=2e-6)


def test_shares_at_the_ends() -> None:
    sigmas = EDM().grid(11)
    assert early_level(sigmas, 0.0) == 80.0 and early_level(sigmas, 1.0) == 0.002
    assert int((sigmas[1:] <= early_level(sigmas, 0.4)).sum()) == 6


def test_the_diffusion_loss_is_the_mean_over_the_early_samples() -> None:
    sigma = torch.tensor([0.05, 3.0, 0.0850, 0.0851], dtype=torch.float64)
    y, x0 = torch.randn(2, 4, 2, 3, 3)
    y.requires_grad_(True)
    m = (y - x0).square().mean((1, 2, 3)).double()
    expected = ((1 / 0.05**2 + 4) * m[0] + (1 / 0.085**2 + 4) * m[2]) / 2
    found = early_diffusion(y, x0, sigma, 0.085, EDM())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    assert y.grad is not None and [bool(g.any()) for g in y.grad] == [True, False, True, False]
    y.grad = None
    none = early_diffusion(y, x0, sigma, 0.002, EDM())
    none.backward()
    assert none.item() == 0.0 and not y.grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "far"), [("cauchy", 0.1), ("geman_mcclure", 0.001), ("mean_huber", 1.0), ("l2", 10.0)]
)
def test_an_outlier_pulls_as_its_distance_says(kind: Any, far: float) -> None:
    """Gradient of a sample with one latent element off by 1,000 over that by 100: about 1/10, 1/1000, 1 and 10."""
    norms = []
    for size in (100.0, 1000.0):
        d = 0.01 * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        d[1, 2, 3, 4] += size
        d.requires_grad_(True)
        m = d.square().mean((1, 2, 3))
        (m if kind == "l2" else robust(kind, m, C)).sum().backward()
        assert d.grad is not None
        norms.append(d.grad[1].norm().item())
    assert norms[1] / norms[0] == pytest.approx(far, rel=0.03)


def fitted(kind: Any, share: float) -> float:
    """Error on clean samples of an affine map fitted by this distance at c = 0.03456, near the residuals' 0.02.

    The targets are "latents" of 16 elements; a share of them has 100 added to one element.
    """
    generator = torch.Generator().manual_seed(1)
    x, true = torch.randn(4000, 16, generator=generator), torch.randn(16, 16, generator=generator) / 4
    targets = x @ true + 0.02 * torch.randn(4000, 16, generator=generator)
    targets[torch.rand(4000, generator=generator) < share, 3] += 100
    weight, bias = torch.zeros(16, 16, requires_grad=True), torch.zeros(16, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, 300)
    for _ in range(300):
        m = (x @ weight + bias - targets).square().mean(1)
        loss = m.mean() if kind == "l2" else robust(kind, m, C).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return (x @ (weight - true) + bias).square().mean().sqrt().item()


def test_impulsive_outliers_bend_huber_and_not_cauchy() -> None:
    clean = {kind: fitted(kind, 0.0) for kind in ("cauchy", "mean_huber")}
    planted = {kind: fitted(kind, 0.3) for kind in ("cauchy", "geman_mcclure", "mean_huber", "l2")}
    assert clean["cauchy"] < 1.2 * clean["mean_huber"] < 0.002, clean
    assert planted["cauchy"] < 1.5 * clean["cauchy"], (clean, planted)
    assert planted["geman_mcclure"] < 1.1 * planted["cauchy"]
    assert planted["mean_huber"] > 8 * planted["cauchy"] and planted["l2"] > 0.5, planted
