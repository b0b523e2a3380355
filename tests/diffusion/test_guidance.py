"""Guidance, boundary and distance against recorded values, diffusers' own code and closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction, lcm_boundary
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.guidance import guidance_embedding, guided, guided_x0_eps
from fewstep.distill.diffusion.losses import distance
from fewstep.distill.diffusion.process import VP
from fewstep.distill.diffusion.solvers import ddim_step
from torch import Tensor, nn

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STATE = torch.tensor([[0.5, -1.0, 1.5, 2.0]])
COND = torch.tensor([[0.3, -0.2, 0.8, 1.1]])
UNCOND = torch.tensor([[0.1, -0.4, 0.9, 1.0]])
W = 7.5


class Table(nn.Module):
    """Puts out its prompt row: whatever the condition holds is the network's answer."""

    def forward(self, x: Tensor, output: Tensor) -> tuple[Tensor]:
        return (output.expand_as(x),)


class TableDenoiser(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, condition.arguments["output"]), {}


def table(kind: str) -> tuple[TableDenoiser, Condition]:
    return TableDenoiser(Table(), VP.from_scheduler(SD), kind), Condition(
        {"output": COND}, {"output": UNCOND}
    )


RECORDED = {
    ("epsilon", 519, 499): (
        [-2.107772, -4.235953, 2.904339, 0.796569],
        [1.8, 1.3, 0.05, 1.85],
        [0.419144, -1.127238, 1.572918, 1.992063],
    ),
    ("v_prediction", 519, 499): (
        [-1.306418, -1.626224, 0.709107, -0.597311],
        [1.335392, -0.213067, 1.322750, 2.658143],
        [0.446542, -1.038014, 1.497864, 1.944407],
    ),
    ("epsilon", 19, 0): (
        [0.262488, -1.183784, 1.506774, 1.769263],
        [1.8, 1.3, 0.05, 1.85],
        [0.314855, -1.145379, 1.507591, 1.822447],
    ),
}
V_OUTPUT_TAKEN_FOR_EPS = torch.tensor([[0.841412, 0.247942, 0.416154, 1.257566]])


@pytest.mark.parametrize(("kind", "t", "s"), list(RECORDED))
def test_guided_ddim_step_has_the_recorded_values(kind: str, t: int, s: int) -> None:
    """omega 7.5 is a guidance scale of 8.5."""
    denoiser, condition = table(kind)
    x0, eps = guided_x0_eps(denoiser, STATE, torch.tensor([t]), condition, torch.tensor([W + 1]))
    z = ddim_step(x0, eps, denoiser.process, torch.tensor([s]))
    for value, expected in zip((x0, eps, z), RECORDED[kind, t, s], strict=True):
        torch.testing.assert_close(value, torch.tensor([expected]), rtol=0, atol=2e-6)


def test_a_v_output_is_not_taken_for_noise() -> None:
    """The recorded wrong values arise from v's x0 with the raw output as eps, and are far from the right ones."""
    denoiser, condition = table("v_prediction")
    t, scale = torch.tensor([519]), torch.tensor([W + 1])
    x0, eps = guided_x0_eps(denoiser, STATE, t, condition, scale)
    wrong = ddim_step(x0, guided(COND, UNCOND, scale), denoiser.process, torch.tensor([499]))
    torch.testing.assert_close(wrong, V_OUTPUT_TAKEN_FOR_EPS, rtol=0, atol=2e-6)
    right = ddim_step(x0, eps, denoiser.process, torch.tensor([499]))
    assert (right - V_OUTPUT_TAKEN_FOR_EPS).abs().min() > 0.3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_guided_step_of_the_grid_is_that_of_ddim_scheduler(kind: str) -> None:
    """Both give z at the 49 lower levels of the grid and, from t = 19, at t = 0."""
    scheduler = DDIMScheduler(
        **SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(50)
    denoiser, condition = table(kind)
    output = UNCOND + (W + 1) * (COND - UNCOND)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))
    for t in scheduler.timesteps:
        expected = scheduler.step(output, t, STATE, eta=0.0).prev_sample
        x0, eps = guided_x0_eps(denoiser, STATE, t[None], condition, torch.tensor([W + 1]))
        z = ddim_step(x0, eps, denoiser.process, (t[None] - 20).clamp(min=0))
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


def test_each_row_has_its_own_guidance_scale() -> None:
    scale = torch.tensor([0.0, 1.0, 8.5])
    mixed = guided(COND.expand(3, 4), UNCOND.expand(3, 4), scale)
    expected = torch.cat([UNCOND, COND, (1 + W) * COND - W * UNCOND])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


def test_both_branches_belong_to_their_own_row_and_time() -> None:
    """A batch equals its rows, with different states, times, prompts and scales."""
    denoiser, _ = table("v_prediction")
    x, prompts = torch.randn(2, 3, 4)
    condition = Condition({"output": prompts}, {"output": UNCOND})
    t, scale = torch.tensor([19.0, 519.0, 999.0], dtype=torch.float64), torch.tensor([2.0, 5.0, 9.0])
    whole = guided_x0_eps(denoiser, x, t, condition, scale)
    for i in range(3):
        one = Condition({"output": prompts[i : i + 1]}, {"output": UNCOND})
        row = guided_x0_eps(denoiser, x[i : i + 1], t[i : i + 1], one, scale[i : i + 1])
        for a, b in zip(whole, row, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-6, atol=1e-6)


def test_boundary_scalings_have_the_recorded_values() -> None:
    t = torch.tensor([0, 1, 19, 259, 999])
    c_skip, c_out = lcm_boundary(t)
    recorded = [1, 2.493766e-3, 6.925160e-6, 3.726838e-8, 2.505008e-9]
    torch.testing.assert_close(c_skip, torch.tensor(recorded, dtype=torch.float64), rtol=1e-6, atol=0)
    recorded = [0, 0.998752, 0.9999965, 1.0, 1.0]
    torch.testing.assert_close(c_out, torch.tensor(recorded, dtype=torch.float64), rtol=1e-6, atol=0)
    plain, _ = lcm_boundary(t, timestep_scaling=1.0)
    recorded = [1, 0.2, 6.920e-4, 3.7268e-6, 2.5050e-7]
    torch.testing.assert_close(plain, torch.tensor(recorded, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scaling", [1.0, 10.0])
def test_boundary_scalings_are_those_of_lcm_scheduler(scaling: float) -> None:
    scheduler = LCMScheduler(timestep_scaling=scaling)
    for t in range(0, 1000, 111):
        ours = [c.item() for c in lcm_boundary(torch.tensor([t]), scaling)]
        assert ours == pytest.approx(scheduler.get_scalings_for_boundary_condition_discrete(t), rel=1e-12)


def test_consistency_function_has_the_recorded_values_and_the_identity_at_zero() -> None:
    denoiser, condition = table("epsilon")
    function = ConsistencyFunction(denoiser)
    at_519 = torch.tensor([[0.479421, -1.648761, 1.610743, 2.090165]])
    torch.testing.assert_close(function(STATE, torch.tensor([519]), condition), at_519, rtol=0, atol=2e-6)
    assert torch.equal(function(STATE, torch.tensor([0]), condition), STATE)
    slow = ConsistencyFunction(denoiser, partial(lcm_boundary, timestep_scaling=0.01))(
        STATE, torch.tensor([519]), condition
    )
    s = 5.19
    expected = 0.25 / (s**2 + 0.25) * STATE + s / math.sqrt(s**2 + 0.25) * at_519
    torch.testing.assert_close(slow, expected, rtol=0, atol=5e-6)


def test_guidance_embedding_has_the_recorded_values() -> None:
    e = guidance_embedding(torch.tensor([7.5]))[0]
    assert e.shape == (256,)
    recorded = torch.tensor([-0.851236, 0.842131, 0.011876, 0.681639, -0.524783, 0.731689])
    torch.testing.assert_close(e[[0, 1, 2, 127, 128, 255]], recorded, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dim", [4, 33, 256])
def test_guidance_embedding_against_float64_and_odd_widths(dim: int) -> None:
    """Angles reach 15,000, where float32 is good to 1e-3."""
    w = np.linspace(0, 15, 61)
    half = dim // 2
    angle = 1000 * w[:, None] * 10000 ** (-np.arange(half) / (half - 1))
    expected = np.concatenate([np.sin(angle), np.cos(angle), np.zeros((61, dim % 2))], axis=1)
    e = guidance_embedding(torch.tensor(w, dtype=torch.float32), dim)
    assert np.abs(e.numpy() - expected).max() < 2e-3


@pytest.mark.parametrize("dim", [33, 256])
def test_guidance_embedding_is_that_of_the_exported_pipeline(dim: int) -> None:
    """The pipeline embeds guidance_scale - 1 with this function: a student must have been trained on its values."""
    w = torch.linspace(0, 15, 61)
    pipeline = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    torch.testing.assert_close(guidance_embedding(w, dim), pipeline, rtol=0, atol=1e-6)


def test_huber_has_the_recorded_values_and_slope() -> None:
    d = torch.tensor([0, 1e-3, 1e-2, 1e-1, 1], requires_grad=True)
    each = torch.stack([distance("huber", x, torch.zeros(()), 1e-3) for x in d])
    recorded = torch.tensor([0, 4.142136e-4, 9.049876e-3, 9.900501e-2, 0.9990005])
    torch.testing.assert_close(each, recorded, rtol=2e-6, atol=1e-9)
    loss = distance("huber", d, torch.zeros(5))
    assert loss.item() == pytest.approx(0.2214939, abs=1e-7)
    (slope,) = torch.autograd.grad(loss, d)
    expected = d.detach() / (d.detach().square() + 1e-6).sqrt() / 5
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-9)


def test_distances_are_means_in_float32_and_know_their_constant() -> None:
    prediction, target = torch.randn(2, 2, 3, 4)
    d = (prediction - target).double()
    assert distance("l2", prediction, target).item() == pytest.approx(d.square().mean().item(), rel=1e-6)
    pseudo = ((d.square() + 0.25).sqrt() - 0.5).mean().item()
    assert distance("huber", prediction, target, 0.5).item() == pytest.approx(pseudo, rel=1e-6)
    low = distance("huber", prediction.bfloat16(), target.bfloat16(), 0.5)
    assert low.dtype == torch.float32
    rounded = (prediction.bfloat16().double() - target.bfloat16().double()).square()
    assert low.item() == pytest.approx(((rounded + 0.25).sqrt() - 0.5).mean().item(), rel=1e-5)
