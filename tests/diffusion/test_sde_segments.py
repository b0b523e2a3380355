"""Several stochastic steps: constant noise, the exact teacher of Gaussian data, and the slopes it leads to."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.process import VP
from fewstep.distill.diffusion.solvers import (
    NOISE_FUNCTIONS,
    Variance,
    between,
    ddim_variance,
    er_sde_variance,
    sde_segment,
)
from torch import Tensor

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
Z = torch.tensor([[0.5, -1.0, 1.5, 2.0]], dtype=torch.float64)
EPS = torch.tensor([[1.8, 1.3, 0.05, 1.85]], dtype=torch.float64)


@pytest.fixture
def vp() -> VP:
    return VP.from_scheduler(SD)


def time(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def eta(value: float) -> Variance:
    return partial(ddim_variance, eta=value)


def er_sde(name: str) -> Variance:
    return partial(er_sde_variance, phi=NOISE_FUNCTIONS[name])


def test_sub_steps_are_whole_equal_and_fewer_where_there_is_no_room() -> None:
    t, s = torch.tensor([519.0, 20, 2, 1]), torch.tensor([495.0, 0, 0, 0])
    rows = torch.stack(between(t, s, 3), 1).tolist()
    assert rows == [[519, 511, 503, 495], [20, 13, 7, 0], [2, 1, 1, 0], [1, 1, 0, 0]]


def basis(count: int) -> Iterator[Tensor]:
    """Unit vectors e_1, e_2, ... beside the state's own e_0: linear maps of independent unit Gaussians."""
    yield from torch.eye(count + 1, dtype=torch.float64)[1:, None]


def segment(
    vp: VP, variance: Variance, num_steps: int, guide: Callable[[Tensor, Tensor], Any], first: Tensor
) -> Tensor:
    draws = basis(num_steps)
    times = between(time(519), time(495), num_steps)
    return sde_segment(guide, first, times, vp, variance, lambda: next(draws))


@pytest.mark.parametrize(
    ("variance", "one", "three", "mean"),
    [
        (eta(0), 0.0, 0.0, [0.402725, -1.152886, 1.587518, 1.990242]),
        (eta(0.2), 0.065274, 0.068868, [0.397818, -1.156429, 1.587381, 1.985199]),
        (eta(1), 0.326368, 0.344342, [0.278471, -1.242624, 1.584066, 1.862537]),
        (er_sde("SDE_5"), 0.098466, 0.101446, [0.392074, -1.160578, 1.587222, 1.979295]),
    ],
)
def test_a_segment_with_constant_eps(
    variance: Variance, one: float, three: float, mean: list[float], vp: VP
) -> None:
    def guide(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (z - vp.sigma(t) * EPS) / vp.alpha(t), EPS

    def centred(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return z / vp.alpha(t), torch.zeros_like(z)

    for num_steps, deviation in ((1, one), (3, three)):
        spread = segment(vp, variance, num_steps, centred, torch.zeros(1, num_steps + 1).double())
        assert spread.norm().item() == pytest.approx(deviation, abs=6e-7)
    times = between(time(519), time(495), 3)
    moved = sde_segment(guide, Z, times, vp, variance, lambda: torch.zeros_like(Z))
    torch.testing.assert_close(moved[0], torch.tensor(mean).double(), rtol=0, atol=6e-7)
    if one == 0:  # DDIM is exact here, in however many steps
        whole = sde_segment(guide, Z, [times[0], times[-1]], vp, variance, lambda: torch.zeros_like(Z))
        torch.testing.assert_close(moved, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("variance", "one", "three"),
    [
        (eta(0), 0.998735, 0.999578),
        (eta(0.2), 0.998644, 0.999546),
        (eta(1), 0.995324, 0.998418),
        (er_sde("SDE_5"), 0.998522, 0.999507),
    ],
)
def test_gaussian_data_keep_their_variance_nearly(
    variance: Variance, one: float, three: float, vp: VP
) -> None:
    """The exact teacher of N(0, 1): x0 = alpha z, eps = sigma z. Full eps beside the noise would give 1.105."""

    def guide(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return vp.alpha(t) * z, vp.sigma(t) * z

    for num_steps, expected in ((1, one), (3, three)):
        first = torch.eye(num_steps + 1, dtype=torch.float64)[:1]
        end = segment(vp, variance, num_steps, guide, first)
        assert end.square().sum().item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("variance", "slopes"),
    [
        (eta(0), (0.9939, 0.9915, 0.9900, 0.9896)),
        (eta(0.1), (0.9920, 0.9849, 0.9760, 0.9643)),
        (eta(0.2), (0.9861, 0.9654, 0.9350, 0.8922)),
        (eta(0.3), (0.9765, 0.9338, 0.8704, 0.7835)),
        (eta(0.6), (0.9256, 0.7789, 0.5893, 0.3857)),
        (er_sde("SDE_5"), (0.9852, 0.9499, 0.8664, 0.6603)),
        (eta(1), (0.8121, 0.5018, 0.2286, 0.0683)),
    ],
)
def test_slopes_of_the_regression_on_gaussian_data(
    variance: Variance, slopes: tuple[float, ...], vp: VP
) -> None:
    """The mean of the target is linear in z: segments of 24 in 3 steps, from t down to 0."""
    found = [slope(vp, variance, t, 3) for t in (259, 519, 759, 999)]
    assert found == pytest.approx(slopes, abs=6e-5)
    if slopes[0] == 0.8121:
        exact = [(vp.alpha(time(t)) / vp.alpha(time(0))).item() for t in (259, 519, 759, 999)]
        assert found == pytest.approx(exact, rel=1e-9)
        assert [slope(vp, variance, t, 1) for t in (259, 999)] == pytest.approx(
            [exact[0], exact[3]], rel=1e-9
        )


def test_slopes_of_single_deterministic_steps(vp: VP) -> None:
    found = [slope(vp, eta(0), t, 1) for t in (259, 519, 759, 999)]
    assert found == pytest.approx((0.9823, 0.9750, 0.9708, 0.9694), abs=6e-5)


def slope(vp: VP, variance: Variance, t: int, num_steps: int) -> float:
    def guide(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return vp.alpha(u) * z, vp.sigma(u) * z

    z, high = torch.ones(1, 1, dtype=torch.float64), t
    while high > 0:
        low = max(high - 24, 0)
        times = between(time(high), time(low), num_steps)
        z = sde_segment(guide, z, times, vp, variance, lambda: torch.zeros(1, 1).double())
        high = low
    return z.item()
