"""Noise processes against recorded values, closed forms, finite differences, autograd and diffusers."""

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fewstep.distill.diffusion.process import EDM, VP, NoiseProcess, RectifiedFlow, per_sample
from fewstep.distill.errors import UserError
from torch import Tensor

SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
BETWEEN = torch.tensor([0.25, 0.5, 17.3, 259.75, 499.5, 731.1, 998.6], dtype=torch.float64)


@pytest.fixture
def vp() -> VP:
    return VP.from_scheduler(SD)


def squared_alpha(process: NoiseProcess, t: Tensor) -> Tensor:
    return process.alpha(t).square()


def test_stable_diffusion_schedule_has_the_recorded_values(vp: VP) -> None:
    t = torch.tensor([0, 19, 499, 519, 999])
    recorded = torch.tensor([0.99914998, 0.98224396, 0.27766943, 0.25157753, 0.00466010], dtype=torch.float64)
    torch.testing.assert_close(squared_alpha(vp, t), recorded, rtol=0, atol=2e-8)
    torch.testing.assert_close(vp.sigma(t).square(), 1 - recorded, rtol=0, atol=2e-8)
    assert vp.t_range == (0.0, 999.0)
    assert vp.alpha(t).dtype == vp.sigma(t).dtype == torch.float64


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LCM"])
def test_every_scheduler_of_the_same_betas_gives_its_own_alphas(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD)
    ours = VP.from_scheduler(scheduler.config)
    torch.testing.assert_close(
        squared_alpha(ours, torch.arange(1000)).float(), scheduler.alphas_cumprod, rtol=1e-6, atol=0
    )


def test_other_schedules_are_taken_from_the_config() -> None:
    betas = [0.1, 0.2, 0.3]
    process = VP.from_scheduler({"trained_betas": betas, "num_train_timesteps": 3})
    expected = torch.tensor([0.9, 0.72, 0.504], dtype=torch.float64)
    torch.testing.assert_close(squared_alpha(process, torch.arange(3)), expected, rtol=1e-6, atol=0)
    cosine = VP.from_scheduler({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})
    assert squared_alpha(cosine, torch.tensor([500])).item() == pytest.approx(
        (math.cos(0.509 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2, rel=1e-5
    )


def test_zero_terminal_snr_ends_where_diffusers_euler_scheduler_ends() -> None:
    config = {**SD, "rescale_betas_zero_snr": True}
    process = VP.from_scheduler(config)
    last = torch.tensor([999])
    assert squared_alpha(process, last).item() == pytest.approx(2.0**-24, rel=1e-9)
    euler = diffusers.EulerDiscreteScheduler(**config)
    sigma = (process.sigma(last) / process.alpha(last)).item()
    assert sigma == pytest.approx(euler.sigmas[0].item(), rel=1e-4)
    assert process.log_snr(torch.arange(1000)).isfinite().all()


def test_a_scheduler_without_betas_is_refused_by_name(tmp_path: Path) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule") as caught:
        VP.from_scheduler(flow.config)
    assert "\n" not in str(caught.value)


def test_variance_is_preserved_between_the_steps_too(vp: VP) -> None:
    t = torch.cat([torch.linspace(0, 999, 2001, dtype=torch.float64), BETWEEN])
    total = squared_alpha(vp, t) + vp.sigma(t).square()
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-14)


def test_log_snr_is_the_ratio_and_linear_between_the_steps(vp: VP) -> None:
    ratio = 2 * (vp.alpha(BETWEEN) / vp.sigma(BETWEEN)).log()
    torch.testing.assert_close(vp.log_snr(BETWEEN), ratio, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(NoiseProcess.log_snr(vp, BETWEEN), ratio, rtol=1e-10, atol=1e-10)
    left, right = vp.log_snr(torch.tensor([400.0])), vp.log_snr(torch.tensor([401.0]))
    torch.testing.assert_close(vp.log_snr(torch.tensor([400.25])), 0.75 * left + 0.25 * right)


def test_derivatives_agree_with_finite_differences_and_autograd(vp: VP) -> None:
    step = 1e-4
    for value, derivative in ((vp.alpha, vp.alpha_dot), (vp.sigma, vp.sigma_dot)):
        difference = (value(BETWEEN + step) - value(BETWEEN - step)) / (2 * step)
        torch.testing.assert_close(derivative(BETWEEN), difference, rtol=1e-6, atol=1e-10)
        t = BETWEEN.clone().requires_grad_()
        (graded,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(BETWEEN), graded, rtol=1e-10, atol=0)
    assert (vp.alpha_dot(BETWEEN) < 0).all() and (vp.sigma_dot(BETWEEN) > 0).all()


def test_a_step_leaves_unit_gaussian_data_where_they_are(vp: VP) -> None:
    """x0 = alpha x, eps = sigma x solve unit Gaussian data, so alpha' alpha + sigma' sigma is 0."""
    drift = vp.alpha_dot(BETWEEN) * vp.alpha(BETWEEN) + vp.sigma_dot(BETWEEN) * vp.sigma(BETWEEN)
    assert drift.abs().max() < 1e-15


def test_time_of_inverts_log_snr_and_cuts_at_the_ends(vp: VP) -> None:
    t = torch.cat([torch.arange(1000, dtype=torch.float64), BETWEEN])
    torch.testing.assert_close(vp.time_of(vp.log_snr(t)), t, rtol=0, atol=1e-9)
    far = torch.tensor([100.0, -100.0])
    assert vp.time_of(far).tolist() == [0.0, 999.0]


def test_noised_mixes_each_row_at_its_own_time(vp: VP) -> None:
    x0, eps = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    t = torch.tensor([0.0, 519.0, 999.0])
    abar = torch.tensor([0.99914998, 0.25157753, 0.00466010]).view(3, 1, 1)
    noised = vp.noised(x0, eps, t)
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, abar.sqrt() * x0 + (1 - abar).sqrt() * eps, rtol=1e-5, atol=1e-6)


def test_per_sample_broadcasts_in_the_state_dtype() -> None:
    a = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, 3, 4, 5, dtype=dtype)
        shaped = per_sample(a, x)
        assert shaped.shape == (2, 1, 1, 1) and shaped.dtype == dtype
        assert (shaped * x)[:, 0, 0, 0].tolist() == [2.0, 3.0]


@pytest.fixture
def linear() -> VP:
    return VP.from_scheduler({**SD, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})


def test_map_to_lands_on_the_state_of_equal_snr(vp: VP, linear: VP) -> None:
    """Of the same x0 and eps, at the time of equal ratio, both processes differ by one factor."""
    t = torch.tensor([10.0, 155.5, 420.0, 700.25, 990.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 5, 7, dtype=torch.float64)
    mapped, s = vp.map_to(linear, vp.noised(x0, eps, t), t)
    torch.testing.assert_close(linear.log_snr(s), vp.log_snr(t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mapped, linear.noised(x0, eps, s), rtol=1e-9, atol=1e-9)
    back, time = linear.map_to(vp, mapped, s)
    torch.testing.assert_close(time, t, rtol=0, atol=1e-8)
    torch.testing.assert_close(back, vp.noised(x0, eps, t), rtol=1e-9, atol=1e-9)
    assert (s - t).abs().min() > 1


def test_map_to_cuts_ratios_that_the_other_process_cannot_reach(vp: VP) -> None:
    """At the noisy end the noise keeps its size, at the clean end the data do."""
    narrow = VP(vp.abar[100:900])
    t = torch.tensor([0.0, 999.0], dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    mapped, s = vp.map_to(narrow, x, t)
    assert s.tolist() == [0.0, 799.0]
    clean = (vp.abar[100] / vp.abar[0]).sqrt() * x[0]
    noisy = ((1 - vp.abar[899]) / (1 - vp.abar[999])).sqrt() * x[1]
    torch.testing.assert_close(mapped, torch.stack([clean, noisy]), rtol=1e-10, atol=0)


GRIDS = {
    11: [
        0.002, 0.016721, 0.085087, 0.318283, 0.965417, 2.515219, 5.838948, 12.381576, 24.408342, 45.313734, 80.0,
    ],
    10: [0.002, 0.020435, 0.116639, 0.469979, 1.501742, 4.066124, 9.723201, 21.108677, 42.415189, 80.0],
}  # fmt: skip
NARROW = EDM(0.03, 14.0, 1.3, 5.0)


@pytest.mark.parametrize("num_points", GRIDS)
def test_edm_noise_levels_have_the_recorded_values_and_exact_ends(num_points: int) -> None:
    sigmas = EDM().grid(num_points)
    assert sigmas.tolist() == pytest.approx(GRIDS[num_points], abs=5.1e-7)
    assert sigmas[0].item() == 0.002 and sigmas[-1].item() == 80.0 and sigmas.dtype == torch.float64


def test_edm_levels_of_the_last_stage_have_the_recorded_smallest_gap() -> None:
    gaps = EDM().grid(1281).diff()
    assert gaps.min().item() == pytest.approx(3.90858e-5, rel=2e-6) and gaps.argmin().item() == 0
    assert (1 / gaps).max().item() == pytest.approx(25584.72, abs=5e-3)


@pytest.mark.parametrize("process", [EDM(), NARROW], ids=["default", "narrow"])
def test_edm_levels_are_those_of_diffusers_consistency_scheduler(process: EDM) -> None:
    low, high = process.t_range
    scheduler = diffusers.CMStochasticIterativeScheduler(37, low, high, process.sigma_data, rho=process.rho)
    scheduler.set_timesteps(timesteps=list(range(36, -1, -1)))
    torch.testing.assert_close(process.grid(37).flip(0).float(), scheduler.sigmas[:37], rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", [EDM(), NARROW], ids=["default", "narrow"])
def test_edm_scalings_are_those_of_table_1(process: EDM) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_data=process.sigma_data)
    sigma = process.grid(9)
    c_skip, c_out, c_in = process.scalings(sigma)
    for ours, theirs in zip((c_skip, c_out), scheduler.get_scalings(sigma), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(c_in, (sigma**2 + process.sigma_data**2) ** -0.5, rtol=1e-12, atol=0)
    sigmas = torch.tensor([0.002, 0.1, 0.5, 0.821, 1.526, 80.0], dtype=torch.float64)
    recorded = [1.99998400, 1.96116135, 1.41421356, 1.04028989, 0.62273261, 0.01249976]
    assert EDM().scalings(sigmas)[2].tolist() == pytest.approx(recorded, abs=5.1e-9)


def test_edm_adds_noise_of_standard_deviation_t_and_knows_its_derivatives() -> None:
    process, t = EDM(), torch.tensor([0.002, 0.7, 80.0])
    x0, eps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(process.noised(x0, eps, t), x0 + t.view(3, 1, 1) * eps, rtol=0, atol=0)
    for value, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        torch.testing.assert_close(
            value(t.double() + 0.5) - value(t), 0.5 * derivative(t), rtol=0, atol=1e-13
        )
        assert value(t).dtype == derivative(t).dtype == torch.float64
    torch.testing.assert_close(process.log_snr(t), -2 * t.double().log(), rtol=1e-14, atol=0)
    outside = torch.tensor([-2 * math.log(s) for s in (0.001, 0.02, 90.0)])
    assert process.time_of(outside).tolist() == pytest.approx([0.002, 0.02, 80.0], rel=1e-6)


def test_a_consistency_output_is_noised_from_sigma_min_on() -> None:
    """It stands at sigma_min already: sqrt(t^2 - sigma_min^2) brings it to t, and to sigma_min nothing."""
    x, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    sigma = torch.tensor([0.03, 0.05, 2.0], dtype=torch.float64)
    noised = NARROW.renoised(x, eps, sigma)
    torch.testing.assert_close(noised[1], x[1] + 0.04 * eps[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(noised[2], x[2] + (4 - 0.0009) ** 0.5 * eps[2], rtol=1e-12, atol=0)
    assert torch.equal(noised[0], x[0])
    assert torch.equal(NARROW.renoised(x, eps, sigma / 2)[0], x[0])


def test_variance_exploding_states_are_variance_preserving_ones_divided_by_alpha(vp: VP) -> None:
    """x_VE = x_VP / alpha at sigma_VP / alpha; beyond the ends the dominating part keeps its size."""
    sigma = torch.tensor([0.05, 1.0, 14.0, 0.01, 60.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 5, 6, dtype=torch.float64)
    x = EDM().noised(x0, eps, sigma)
    mapped, t = EDM().map_to(vp, x, sigma)
    inside = slice(0, 3)
    torch.testing.assert_close((vp.sigma(t) / vp.alpha(t))[inside], sigma[inside], rtol=1e-9, atol=0)
    scale = (1 + sigma**2).rsqrt().view(-1, 1)
    torch.testing.assert_close(mapped[inside], (x * scale)[inside], rtol=1e-9, atol=0)
    assert t[3:].tolist() == [0.0, 999.0]
    torch.testing.assert_close(mapped[3], x[3] * 0.99914998**0.5, rtol=1e-7, atol=0)
    torch.testing.assert_close(mapped[4], x[4] / 60 * (1 - 0.00466010) ** 0.5, rtol=1e-7, atol=0)
    back, s = vp.map_to(EDM(), mapped[inside], t[inside])
    torch.testing.assert_close(s, sigma[inside], rtol=1e-9, atol=0)
    torch.testing.assert_close(back, x[inside], rtol=1e-9, atol=0)


def test_the_straight_path_and_its_slopes() -> None:
    process, t = RectifiedFlow(), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(process.noised(x0, eps, t), torch.lerp(x0, eps, t[:, None]))
    slope = torch.func.jvp(lambda s: process.noised(x0, eps, s), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(slope, eps - x0)
    assert process.alpha_dot(t).tolist() == [-1] * 3 and process.sigma_dot(t).tolist() == [1] * 3
    torch.testing.assert_close(process.time_of(process.log_snr(t)), t)
    assert process.time_of(process.log_snr(t)).dtype == torch.float64


def test_straight_paths_reach_what_stable_diffusion_was_trained_on(vp: VP) -> None:
    """Its times end at 0.0283 and 0.93596; state and time go there and back."""
    process, ends = RectifiedFlow(), torch.tensor([0.0, 999.0])
    low, high = process.time_of(vp.log_snr(ends)).tolist()
    assert low == pytest.approx(0.0283, abs=5e-5) and high == pytest.approx(0.93596, abs=5e-6)
    t, z = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    y, s = process.map_to(vp, z, t)
    torch.testing.assert_close((vp.sigma(s) / vp.alpha(s)), t / (1 - t))
    torch.testing.assert_close(y, (vp.alpha(s) + vp.sigma(s))[:, None] * z)
    back, time = vp.map_to(process, y, s)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(time, t)
    _, cut = process.map_to(vp, z, torch.tensor([0.0, 0.5, 1.0]))
    assert cut[0] == 0 and cut[2] == 999
