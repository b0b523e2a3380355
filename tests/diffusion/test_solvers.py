"""DDIM, Euler and Heun steps on Gaussian data, whose flow is known; DDIM sampling against diffusers' scheduler."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.generator import ddim_sample, ends_at_data, seeded
from fewstep.distill.diffusion.process import EDM, VP
from fewstep.distill.diffusion.solvers import ddim_step, euler_edm, heun_edm
from fewstep.distill.models.network_adapters import UNet2DConditionDenoiser
from torch import Tensor

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def vp() -> VP:
    return VP.from_scheduler(SD)


def solve(vp: VP, x: Tensor, times: Tensor, mean: float, spread: float) -> Tensor:
    """DDIM over `times` with the exact denoiser of data N(mean, spread^2)."""
    for t, s in pairwise(times):
        a, sigma = vp.alpha(t), vp.sigma(t)
        x0 = mean + a * spread**2 / (a**2 * spread**2 + sigma**2) * (x - a * mean)
        eps = (x - a * x0) / sigma
        x = ddim_step(x0, eps, vp, s.expand(len(x)))
    return x


def test_a_step_of_unit_gaussian_data_shrinks_by_the_cosine_of_its_angle(vp: VP) -> None:
    """x0 = alpha x and eps = sigma x, theta = arctan(sigma/alpha)."""
    x = torch.randn(5, dtype=torch.float64)
    times = torch.tensor([999.0, 700.5, 20.0, 0.0], dtype=torch.float64)
    theta = torch.atan2(vp.sigma(times), vp.alpha(times))
    factor = (theta[1:] - theta[:-1]).cos().prod()
    torch.testing.assert_close(solve(vp, x, times, 0.0, 1.0), factor * x, rtol=1e-12, atol=0)


def test_many_small_steps_are_the_identity_for_unit_gaussian_data(vp: VP) -> None:
    """The probability flow does not move such data; the error of DDIM falls with the first power of the step."""
    x = torch.ones(1, dtype=torch.float64)
    errors = [
        (1 - solve(vp, x, torch.linspace(999, 0, n + 1, dtype=torch.float64), 0.0, 1.0)).item()
        for n in (500, 1000, 2000)
    ]
    assert 0 < errors[2] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_many_small_steps_follow_the_flow_of_any_gaussian(vp: VP) -> None:
    mean, spread = 0.7, 0.4
    x = torch.randn(5, dtype=torch.float64)
    times = torch.linspace(999, 19, 4001, dtype=torch.float64)

    def deviation(t: Tensor) -> Tensor:
        return (vp.alpha(t).square() * spread**2 + vp.sigma(t).square()).sqrt()

    first, last = times[0], times[-1]
    expected = vp.alpha(last) * mean + deviation(last) / deviation(first) * (x - vp.alpha(first) * mean)
    torch.testing.assert_close(solve(vp, x, times, mean, spread), expected, rtol=0, atol=2e-3)


def test_a_step_to_the_same_time_changes_nothing_and_rows_have_their_own_times(vp: VP) -> None:
    t = torch.tensor([0.0, 333.25, 999.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    x_t = vp.noised(x0, eps, t)
    torch.testing.assert_close(ddim_step(x0, eps, vp, t), x_t, rtol=1e-12, atol=0)
    for i in range(3):
        row = ddim_step(x0[i : i + 1], eps[i : i + 1], vp, t[i : i + 1])
        torch.testing.assert_close(row, x_t[i : i + 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 8, 50])
@pytest.mark.parametrize(("kind", "to_one"), [("epsilon", True), ("epsilon", False), ("v_prediction", True)])
def test_trailing_sampling_is_that_of_ddim_scheduler(
    num_steps: int, kind: str, to_one: bool, tiny_pipeline: Path, vp: VP
) -> None:
    """diffusers' scheduler stepped by hand on the same noise, its last step going to alpha = 1 or to the first one."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").requires_grad_(False)
    prompt, empty = torch.randn(2, 12, 16), torch.randn(1, 12, 16)
    condition = Condition({"encoder_hidden_states": prompt}, {"encoder_hidden_states": empty})
    denoiser = UNet2DConditionDenoiser(unet, vp, kind)
    scheduler = DDIMScheduler(
        **SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing="trailing"
    )
    assert ends_at_data(scheduler) == to_one
    ours = ddim_sample(denoiser, (4, 8, 8), condition, num_steps, 3.0, seeded(2, 5), to_data=to_one)

    scheduler.set_timesteps(num_steps)
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5 + i)) for i in range(2)])
    for t in scheduler.timesteps:
        cond = unet(z, t, encoder_hidden_states=prompt).sample
        uncond = unet(z, t, encoder_hidden_states=empty.expand(2, -1, -1)).sample
        z = scheduler.step(uncond + 3.0 * (cond - uncond), t, z, eta=0.0).prev_sample
    assert ((ours - z).norm() / z.norm()).item() < 1e-5


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of data N(0, 0.5^2) behind noise of level sigma, (B,) each."""
    return x * 0.25 / (0.25 + sigma**2)


def edm_step(solver: str, x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    if solver == "heun":
        return heun_edm(gaussian_denoiser, x, high, low)
    return euler_edm(x, gaussian_denoiser(x, high), high, low)


@pytest.mark.parametrize(
    ("levels", "euler", "heun", "exact"),
    [
        ((1.501742, 0.469979), 0.38151690, 0.49431765, 0.43354235),
        ((0.02043534, 0.002), 0.99849558, 0.99917416, 0.99917383),
    ],
)
def test_edm_steps_of_gaussian_data_have_the_recorded_ratios(
    levels: tuple[float, float], euler: float, heun: float, exact: float
) -> None:
    high, low = torch.tensor(levels, dtype=torch.float64).view(2, 1)
    x = torch.tensor([1.7], dtype=torch.float64)
    assert (edm_step("euler", x, high, low) / x).item() == pytest.approx(euler, abs=5.1e-9)
    assert (edm_step("heun", x, high, low) / x).item() == pytest.approx(heun, abs=5.1e-9)
    assert ((0.25 + low**2) / (0.25 + high**2)).sqrt().item() == pytest.approx(exact, abs=5.1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_edm_solvers_have_their_order(solver: str, order: int) -> None:
    def error(steps: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        sigmas = torch.linspace(3, 0.1, steps + 1, dtype=torch.float64)
        for high, low in pairwise(sigmas.view(-1, 1)):
            x = edm_step(solver, x, high, low)
        return abs(x.item() - ((0.25 + 0.01) / (0.25 + 9)) ** 0.5)

    assert error(200) / error(400) == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_edm_steps_with_the_data_themselves_give_the_same_noise_at_the_lower_level(solver: str) -> None:
    """x_lo = x0 + sigma_lo z: the data-driven loss is the teacher's with a teacher that knows x0."""
    x0, z = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    sigmas = EDM().grid(10)
    low, high = sigmas[:-1], sigmas[1:]
    x = x0 + high.view(-1, 1, 1) * z
    ours = euler_edm(x, x0, high, low) if solver == "euler" else heun_edm(lambda x, sigma: x0, x, high, low)
    assert (ours - (x0 + low.view(-1, 1, 1) * z)).abs().max() < 1e-13


def test_heun_looks_at_both_levels_and_is_eulers_step_where_the_lower_is_zero() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return gaussian_denoiser(x, sigma.view(-1, 1))

    x = torch.randn(2, 3, dtype=torch.float64)
    high, low = torch.tensor([2.0, 3.0]).double(), torch.tensor([0.0, 1.0]).double()
    out = heun_edm(denoise, x, high, low)
    (first, at_high), (second, at_low) = seen
    assert torch.equal(first, x) and torch.equal(at_high, high) and at_low[1].item() == 1.0 and at_low[0] > 0
    ahead = euler_edm(x, gaussian_denoiser(x, high.view(-1, 1)), high, low)
    assert torch.equal(second, ahead) and torch.equal(out[0], ahead[0]) and out.isfinite().all()
    assert (out[1] - ahead[1]).abs().max() > 1e-3
