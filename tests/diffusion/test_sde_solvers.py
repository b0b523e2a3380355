"""One stochastic step: recorded means and deviations, diffusers' schedulers and ER-SDE's own way of writing it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from fewstep.distill.diffusion.process import VP
from fewstep.distill.diffusion.solvers import (
    NOISE_FUNCTIONS,
    Variance,
    ddim_step,
    ddim_variance,
    er_sde_variance,
    sde_step,
)
from torch import Tensor

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
Z = torch.tensor([[0.5, -1.0, 1.5, 2.0]], dtype=torch.float64)
EPS = torch.tensor([[1.8, 1.3, 0.05, 1.85]], dtype=torch.float64)
XI = torch.tensor([[0.7, -0.3, 0.1, -1.2]], dtype=torch.float64)
ZERO = torch.zeros_like(Z)


@pytest.fixture
def vp() -> VP:
    return VP.from_scheduler(SD)


def time(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def eta(value: float) -> Variance:
    return partial(ddim_variance, eta=value)


def er_sde(name: str) -> Variance:
    return partial(er_sde_variance, phi=NOISE_FUNCTIONS[name])


def data_of(vp: VP, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return (z - vp.sigma(t) * eps) / vp.alpha(t)


def stepped(vp: VP, variance: Variance, xi: Tensor, t: float = 519.0, s: float = 511.0) -> Tensor:
    x0 = data_of(vp, Z, EPS, time(t))
    return sde_step(x0, EPS, vp, time(s), variance(vp, time(t), time(s)), xi)


ONE_STEP = [
    (eta(0), 0.0, [0.467911, -1.050683, 1.529143, 1.997054]),
    (eta(0.2), 0.039339, [0.466289, -1.051855, 1.529098, 1.995387]),
    (eta(0.3), 0.059008, [0.464259, -1.053321, 1.529042, 1.993301]),
    (eta(1), 0.196694, [0.426838, -1.080347, 1.528002, 1.954840]),
    (er_sde("SDE"), 0.196694, [0.426838, -1.080347, 1.528002, 1.954840]),
    (er_sde("SDE_5"), 0.058371, [0.464338, -1.053264, 1.529044, 1.993382]),
    (er_sde("ODE"), 0.0, [0.467911, -1.050683, 1.529143, 1.997054]),
]


@pytest.mark.parametrize(("variance", "deviation", "mean"), ONE_STEP)
def test_mean_and_deviation_of_one_step(
    variance: Variance, deviation: float, mean: list[float], vp: VP
) -> None:
    injected = variance(vp, time(519), time(511)).sqrt()
    assert injected.item() == pytest.approx(deviation, abs=6e-7)
    torch.testing.assert_close(stepped(vp, variance, ZERO)[0], torch.tensor(mean).double(), rtol=0, atol=6e-7)
    fresh = stepped(vp, variance, XI) - stepped(vp, variance, ZERO)
    torch.testing.assert_close(fresh, injected * XI, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        (eta(0.3), [0.505565, -1.071023, 1.534942, 1.922491]),
        (eta(1), [0.564524, -1.139356, 1.547672, 1.718807]),
        (er_sde("SDE_5"), [0.505198, -1.070775, 1.534881, 1.923336]),
    ],
)
def test_recorded_steps_with_known_noise(variance: Variance, expected: list[float], vp: VP) -> None:
    torch.testing.assert_close(
        stepped(vp, variance, XI)[0], torch.tensor(expected).double(), rtol=0, atol=6e-7
    )


@pytest.mark.parametrize("value", [0.0, 0.2, 0.3, 0.6, 1.0])
def test_eta_is_that_of_ddim_scheduler(value: float, vp: VP) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(125)
    theirs = scheduler.step(EPS, 519, Z, eta=value, variance_noise=XI).prev_sample
    torch.testing.assert_close(stepped(vp, eta(value), XI), theirs, rtol=0, atol=2e-6)


def test_eta_one_is_the_stochastic_dpm_solver_and_euler_ancestral(vp: VP) -> None:
    ours = stepped(vp, eta(1), XI)
    solver = DPMSolverMultistepScheduler(
        **SD, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
    )
    solver.set_timesteps(timesteps=[519, 511, 503])
    theirs = solver.step(EPS, 519, Z, variance_noise=XI).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    euler = EulerAncestralDiscreteScheduler(**SD)
    euler.set_timesteps(1000)  # its own strides do not fit: the two noise levels are put in place
    levels = [float(vp.sigma(time(t)) / vp.alpha(time(t))) for t in (519, 511)]
    euler.timesteps = torch.tensor([519.0, 511.0])
    euler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    euler._step_index, euler.is_scale_input_called = 0, True
    draw: Callable[..., Tensor] = lambda *args, **kwargs: XI  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", draw)
        moved = euler.step(EPS, 519.0, Z / vp.alpha(time(519))).prev_sample
    torch.testing.assert_close(ours, moved * vp.alpha(time(511)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", list(NOISE_FUNCTIONS))
def test_er_sde_as_its_code_writes_it(name: str, vp: VP) -> None:
    """z_s = (alpha_s / alpha_t) r z + alpha_s (1 - r) x0 + sqrt(v) xi: the same line in other words."""
    t, s = time(519), time(511)
    lam = {u: vp.sigma(x) / vp.alpha(x) for u, x in (("t", t), ("s", s))}
    r = NOISE_FUNCTIONS[name](lam["s"]) / NOISE_FUNCTIONS[name](lam["t"])
    v = vp.alpha(s) ** 2 * (lam["s"] ** 2 - lam["t"] ** 2 * r**2)
    assert (v >= -1e-12).all()
    x0 = data_of(vp, Z, EPS, t)
    theirs = (vp.alpha(s) / vp.alpha(t)) * r * Z + vp.alpha(s) * (1 - r) * x0 + v.clamp(min=0).sqrt() * XI
    torch.testing.assert_close(stepped(vp, er_sde(name), XI), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("t", "equivalent"), [(999, 0.574), (759, 0.388), (519, 0.297), (259, 0.235), (39, 0.177)]
)
def test_sde_5_is_an_eta_that_grows_with_the_time(t: int, equivalent: float, vp: VP) -> None:
    both = [v(vp, time(t), time(t - 8)) for v in (er_sde("SDE_5"), eta(1))]
    assert (both[0] / both[1]).sqrt().item() == pytest.approx(equivalent, abs=6e-4)


def test_without_noise_a_step_is_ddims_bit_for_bit(vp: VP) -> None:
    """In float32 and float64, whatever the noise; and a step to the same time moves nothing."""
    t, s = torch.tensor([999.0, 519, 1]).double(), torch.tensor([975.0, 511, 0]).double()
    for kind in (torch.float32, torch.float64):
        x0, eps, noise = torch.randn(3, 3, 5, dtype=kind)
        assert torch.equal(sde_step(x0, eps, vp, s, eta(0)(vp, t, s), noise), ddim_step(x0, eps, vp, s))
    for variance in (eta(1), er_sde("SDE_5")):
        assert torch.equal(variance(vp, t, t), torch.zeros(3).double())
