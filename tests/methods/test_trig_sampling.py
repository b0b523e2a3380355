"""Few steps in TrigFlow against the stock schedulers that the exports use, on the same noise."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler, SCMScheduler
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction, no_boundary
from fewstep.distill.diffusion.denoiser import Denoiser, seen_in
from fewstep.distill.diffusion.generator import Generator
from fewstep.distill.diffusion.process import EDM, VP, NoiseProcess, RectifiedFlow, TrigFlow
from fewstep.distill.errors import UserError
from fewstep.distill.methods.score_distillation.trig_sampling import TrigSampling
from torch import Tensor, nn

NOTHING = Condition({}, {})
TIMES = [math.atan(80.0), 1.5, 1.4, 1.0]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


class Wave(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return ((0.8 * x + torch.sin(3 * x) + 0.1 * torch.cos(0.01 * t.view(-1, 1, 1, 1))).to(x.dtype),)


class Direct(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


def sampler(
    inner: NoiseProcess, kind: str, times: list[float], outer: TrigFlow | None = None
) -> tuple[Any, Any]:
    denoiser = seen_in(Direct(Wave(), inner, kind), outer or TrigFlow())
    sampling = TrigSampling(denoiser, times)

    def ours(noise: Tensor, steps: int, fresh: list[Tensor]) -> Tensor:
        left = list(fresh)
        generator = Generator(ConsistencyFunction(denoiser, no_boundary), sampling.times[:steps])
        return generator(sampling.start(noise, sampling.times[0]), NOTHING, lambda x: left.pop(0).to(x))

    return sampling, ours


def drawn(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(count)]


def test_recorded_sigmas_and_the_stock_flow_matching_schedulers() -> None:
    """x = (1 - tau') (x - tau v) + tau' noise is the same walk; the pipelines start it from unit noise."""
    sampling, ours = sampler(RectifiedFlow(), "velocity", TIMES)
    sigmas = sampling.calls()["4"]["sigmas"]
    assert sigmas == pytest.approx([0.987654, 0.933781, 0.852895, 0.608979], abs=5e-7)
    assert sampling.calls()["2"] == {"sigmas": sigmas[:2]}
    noise, *fresh = drawn(0, 4)
    network, found = Wave(), ours(noise, 4, fresh)
    for stock in (sampling.scheduler(), FlowMatchLCMScheduler(shift=1.0)):
        stock.set_timesteps(sigmas=sigmas)
        x, generator = noise, torch.Generator().manual_seed(0)
        torch.randn(noise.shape, generator=generator)
        for sigma, t in zip(stock.sigmas, stock.timesteps, strict=False):
            v = network(x, sigma.expand(2))[0]
            x = stock.step(v, t, x, generator=generator, return_dict=False)[0]
        assert ((x - found).norm() / found.norm()).item() < 1e-6
    tau = [*sigmas, 0.0]
    x, left = (tau[0] * noise).double(), list(fresh)
    for a, b in pairwise(tau):
        x = (1 - b) * (x - a * network(x, torch.full((2,), a))[0])
        x = x + b * left.pop(0) if b else x
    scaled = ours(tau[0] * noise.double(), 4, fresh)
    torch.testing.assert_close(scaled, x, rtol=1e-7, atol=1e-7)
    assert isinstance(sampling.scheduler(), FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["trigflow", "edm"])
def test_the_scm_scheduler(kind: str, sigma_data: float) -> None:
    outer = TrigFlow(sigma_data)
    inner = EDM(1e-3, 300, sigma_data) if kind == "edm" else outer
    sampling, ours = sampler(inner, kind, TIMES, outer)
    stock = sampling.scheduler()
    assert isinstance(stock, SCMScheduler)
    times = sampling.calls()["4"]["timesteps"]
    stock.set_timesteps(4, [*times, 0.0], max_timesteps=None, intermediate_timesteps=None)
    noise, *fresh = drawn(0, 4)
    x0, x, generator = noise, sigma_data * noise, torch.Generator().manual_seed(0)
    torch.randn(noise.shape, generator=generator)
    for t in stock.timesteps[:-1]:
        told = (250 * (sigma_data * t.double().tan()).log() if kind == "edm" else t).expand(2)
        f = (-1 if kind == "edm" else 1) * Wave()(x / sigma_data, told)[0]
        x, x0 = stock.step(sigma_data * f, t, x, generator=generator, return_dict=False)
    found = ours(noise, 4, fresh)
    assert ((x0 - found).norm() / found.norm()).item() < 2e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_lcm_scheduler_at_whole_steps(kind: str) -> None:
    vp = VP.from_scheduler(SD)
    sampling, ours = sampler(vp, kind, [math.atan(80.0), 1.3, 1.0, 0.6])
    assert sampling.calls()["4"] == {"timesteps": [999, 719, 488, 245]}
    back = vp.time_of(TrigFlow().log_snr(torch.tensor(sampling.times, dtype=torch.float64)))
    torch.testing.assert_close(back, torch.tensor([999, 719, 488, 245]).double(), rtol=0, atol=1e-6)
    stock = sampling.scheduler()
    assert isinstance(stock, LCMScheduler)
    boundary = [stock.get_scalings_for_boundary_condition_discrete(t) for t in (719, 488, 245)]
    assert all(abs(skip) < 1e-6 and abs(out - 1) < 1e-6 for skip, out in boundary)
    stock.set_timesteps(timesteps=[999, 719, 488, 245])
    noise, *fresh = drawn(0, 4)
    x0, x, generator = noise, noise, torch.Generator().manual_seed(0)
    torch.randn(noise.shape, generator=generator)
    for t in stock.timesteps:
        x, x0 = stock.step(Wave()(x, t.expand(2))[0], t, x, generator=generator, return_dict=False)
    found = ours(noise, 4, fresh)
    assert ((x0 - found).norm() / found.norm()).item() < 1e-5


def test_times_beyond_the_first_are_left_out_and_others_must_decrease() -> None:
    vp = VP.from_scheduler(SD)
    sampling, _ = sampler(vp, "epsilon", [math.atan(14.6), 1.5585, 1.5, 1.0])
    assert sampling.steps[0] == 998 and len(sampling.times) == 3 and sampling.steps[1] == 993
    with pytest.raises(UserError, match="do not decrease; sort them"):
        sampler(vp, "epsilon", [1.5, 0.6, 1.0])


def test_no_time_is_rounded_beyond_the_end() -> None:
    for inner, kind in ((TrigFlow(), "trigflow"), (RectifiedFlow(), "velocity")):
        sampling, ours = sampler(inner, kind, [math.pi / 2, 1.0])
        assert sampling.times[0] <= math.pi / 2
        noise, *fresh = drawn(0, 2)
        assert ours(noise, 2, fresh).isfinite().all()


def test_the_start_is_unit_noise_of_the_networks_own_process() -> None:
    one = torch.ones(1)
    time = math.atan(80.0)
    assert sampler(RectifiedFlow(), "velocity", TIMES)[0].start(one, time).item() == pytest.approx(
        math.sin(time) + math.cos(time)
    )
    assert sampler(RectifiedFlow(), "velocity", TIMES)[0].start(one, math.pi / 2).item() == pytest.approx(1)
    sampling, _ = sampler(VP.from_scheduler(SD), "epsilon", TIMES)
    assert sampling.start(one, sampling.times[0]).item() == pytest.approx(1, abs=1e-7)
    assert sampler(TrigFlow(0.5), "trigflow", TIMES, TrigFlow(0.5))[0].start(one, time).item() == 0.5
