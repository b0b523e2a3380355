"""Multistep consistency sampling against diffusers' LCMScheduler, its random draws and its gradients."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.generator import Generator, fresh_from, lcm_timesteps, seeded
from fewstep.distill.diffusion.process import VP
from fewstep.distill.models.network_adapters import UNet2DConditionDenoiser
from torch import Tensor, nn

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RECORDED = {
    1: [999],
    2: [999, 499],
    3: [999, 679, 339],
    4: [999, 759, 499, 259],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


@pytest.mark.parametrize("num_steps", RECORDED)
def test_timesteps_have_the_recorded_values(num_steps: int) -> None:
    assert lcm_timesteps(num_steps) == RECORDED[num_steps]


@pytest.mark.parametrize("original_steps", [8, 25, 50, 100])
def test_timesteps_are_those_of_lcm_scheduler(original_steps: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        scheduler.set_timesteps(num_steps)
        assert lcm_timesteps(num_steps, original_steps) == scheduler.timesteps.tolist()


def test_a_power_moves_times_towards_the_data() -> None:
    assert [lcm_timesteps(n, power=2) for n in (1, 2, 4)] == [[999], [999, 259], [999, 579, 259, 79]]
    assert lcm_timesteps(4, 50, 1000, 1.0000001) == RECORDED[4]
    for power in (1.5, 3):
        times = lcm_timesteps(4, power=power)
        assert times == sorted(set(times), reverse=True) and all((t + 1) % 20 == 0 for t in times)
    with pytest.raises(ValueError, match="num_steps 8: power 4 puts two of them on one of 50 times"):
        lcm_timesteps(8, power=4)


@pytest.mark.parametrize("num_steps", [0, 51])
def test_more_steps_than_the_grid_or_none_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps {num_steps} is not in 1..50"):
        lcm_timesteps(num_steps)


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").requires_grad_(False)


def prompts(rows: int) -> Condition:
    states = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(9))[:rows]
    return Condition({"encoder_hidden_states": states}, {"encoder_hidden_states": torch.zeros(1, 12, 16)})


def sampled(unet: UNet2DConditionModel, kind: str, seeds: list[int], num_steps: int) -> Tensor:
    function = ConsistencyFunction(UNet2DConditionDenoiser(unet, VP.from_scheduler(SD), kind))
    fresh = fresh_from([torch.Generator().manual_seed(s) for s in seeds])
    noise = fresh(torch.empty(len(seeds), 4, 8, 8))
    return Generator(function, lcm_timesteps(num_steps))(noise, prompts(len(seeds)), fresh)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_sampling_is_lcm_scheduler_stepped_by_hand(
    num_steps: int, kind: str, unet: UNet2DConditionModel
) -> None:
    ours = sampled(unet, kind, [4, 11, 7], num_steps)
    scheduler = LCMScheduler(**SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(num_steps)
    generators = [torch.Generator().manual_seed(s) for s in (4, 11, 7)]
    z = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    states = prompts(3).arguments["encoder_hidden_states"]
    denoised = z
    for t in scheduler.timesteps:
        output = unet(z, t, encoder_hidden_states=states).sample
        z, denoised = scheduler.step(output, t, z, generator=generators, return_dict=False)
    assert torch.equal(z, denoised)
    assert relative(ours, z) < 3e-6


def test_an_image_does_not_depend_on_the_batch(unet: UNet2DConditionModel) -> None:
    whole = sampled(unet, "epsilon", [4, 11, 7], 4)
    assert relative(sampled(unet, "epsilon", [4], 4), whole[:1]) < 1e-5
    assert relative(sampled(unet, "epsilon", [4, 12, 7], 4)[2], whole[2]) < 1e-5
    assert relative(sampled(unet, "epsilon", [5, 11, 7], 4)[0], whole[0]) > 0.1


def test_seeded_generators_count_up_from_the_seed() -> None:
    for i, generator in enumerate(seeded(3, 40)):
        expected = torch.randn(5, generator=torch.Generator().manual_seed(40 + i))
        assert torch.equal(torch.randn(5, generator=generator), expected)


TIMES = [999, 759, 499, 259]


class Slopes(nn.Module):
    """x0 = slope(t) x, one parameter per time of TIMES."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5, 0.7, 0.9, 1.1]))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        index = torch.tensor([TIMES.index(int(time)) for time in t])
        return (self.slope[index].view(-1, 1) * x,)


class SlopesDenoiser(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


def rollout(
    grad_steps: str, start_index: int = 0, weights: dict[str, Tensor] | None = None
) -> tuple[Slopes, Tensor, Tensor]:
    """The network, the noise (which asks for a gradient) and the sample; fresh noise is the constant 0.3."""
    network = Slopes()
    function = ConsistencyFunction(SlopesDenoiser(network, VP.from_scheduler(SD), "sample"))
    noise = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    sample = Generator(function, TIMES, grad_steps)(
        noise,
        Condition({}, {}),
        partial(torch.full_like, fill_value=0.3),
        start_index=start_index,
        weights=weights,
    )
    return network, noise, sample


def written_out(noise: Tensor, slopes: Tensor, start_index: int = 0) -> Tensor:
    abar = dict(zip(TIMES, VP.from_scheduler(SD).alpha(torch.tensor(TIMES)).square().float(), strict=True))
    x = noise
    for i in range(start_index, 4):
        x0 = slopes[i] * x
        if i < 3:
            x = abar[TIMES[i + 1]].sqrt() * x0 + (1 - abar[TIMES[i + 1]]).sqrt() * 0.3
    return x0


@pytest.mark.parametrize("start_index", [0, 1, 3])
@pytest.mark.parametrize("grad_steps", ["none", "last", "all"])
def test_the_rollout_is_the_recursion_from_the_start_index_on(grad_steps: str, start_index: int) -> None:
    network, noise, sample = rollout(grad_steps, start_index)
    expected = written_out(noise, network.slope, start_index)
    torch.testing.assert_close(sample.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_all_steps_carry_the_gradient_of_the_whole_recursion() -> None:
    network, noise, sample = rollout("all")
    ours = torch.autograd.grad(sample.square().sum(), [network.slope, noise])
    expected = torch.autograd.grad(written_out(noise, network.slope).square().sum(), [network.slope, noise])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert (ours[0].abs() > 1e-5).all() and (ours[1].abs() > 1e-6).all()


def test_the_last_step_alone_carries_its_own_gradient() -> None:
    network, noise, sample = rollout("last")
    slope, through_noise = torch.autograd.grad(
        sample.square().sum(), [network.slope, noise], allow_unused=True
    )
    x_last = sample.detach() / network.slope[3].detach()
    assert slope[:3].tolist() == [0.0, 0.0, 0.0]
    expected = 2 * network.slope[3].detach() * x_last.square().sum()
    assert slope[3].item() == pytest.approx(expected.item(), rel=1e-5)
    assert through_noise is None


def test_no_step_carries_a_gradient_by_default_or_under_no_grad() -> None:
    assert not rollout("none")[2].requires_grad
    with torch.no_grad():
        assert not rollout("all")[2].requires_grad
    assert torch.is_grad_enabled()
    function = ConsistencyFunction(SlopesDenoiser(Slopes(), VP.from_scheduler(SD), "sample"))
    assert not Generator(function, TIMES)(torch.ones(1, 2), Condition({}, {}), torch.zeros_like).requires_grad


def test_other_weights_are_used_for_every_step() -> None:
    slopes = torch.tensor([1.0, 0.2, 0.4, 0.6])
    network, noise, sample = rollout("none", weights={"slope": slopes})
    torch.testing.assert_close(sample, written_out(noise, slopes).detach(), rtol=1e-5, atol=1e-6)
    assert network.slope[0].item() == 0.5


def test_fresh_noise_is_drawn_between_the_steps_only(unet: UNet2DConditionModel) -> None:
    drawn = []

    def fresh(x: Tensor) -> Tensor:
        drawn.append(x.shape)
        return torch.zeros_like(x)

    function = ConsistencyFunction(UNet2DConditionDenoiser(unet, VP.from_scheduler(SD), "epsilon"))
    Generator(function, TIMES)(torch.randn(2, 4, 8, 8), prompts(2), fresh, start_index=1)
    assert drawn == [(2, 4, 8, 8)] * 2


def test_an_unknown_choice_of_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="grad_steps 'first' is not last, all or none"):
        Generator(
            ConsistencyFunction(SlopesDenoiser(Slopes(), VP.from_scheduler(SD), "sample")), TIMES, "first"
        )
