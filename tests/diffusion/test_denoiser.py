"""Views of one output against known data and noise, and the Stable Diffusion adapter against its bare network."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Prediction
from fewstep.distill.diffusion.process import VP, NoiseProcess
from fewstep.distill.models.network_adapters import UNet2DConditionDenoiser
from torch import Tensor

KINDS = ("epsilon", "v_prediction", "sample")


class Straight(NoiseProcess):
    """alpha = 1 - t, sigma = t: a process that does not preserve variance."""

    t_range = (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t.double())

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t.double())

    def time_of(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).sigmoid()


@pytest.fixture
def vp() -> VP:
    return VP(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0))


def known(process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x0, eps, x_t and what a perfect network of each kind would put out."""
    x0, eps = torch.randn(2, len(t), 3, 2, dtype=torch.float64)
    a, s = process.alpha(t).view(-1, 1, 1), process.sigma(t).view(-1, 1, 1)
    return x0, eps, a * x0 + s * eps, {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vp", "straight"])
def test_all_views_recover_the_data_and_noise_of_any_kind(name: str, kind: str, vp: VP) -> None:
    process: NoiseProcess = vp if name == "vp" else Straight()
    t = torch.tensor([0.1, 0.5, 0.9] if name == "straight" else [3.0, 519.0, 998.5], dtype=torch.float64)
    x0, eps, x_t, outputs = known(process, t)
    seen = Prediction(outputs[kind], x_t, t, process, kind)
    velocity = process.alpha_dot(t).view(-1, 1, 1) * x0 + process.sigma_dot(t).view(-1, 1, 1) * eps
    for view, expected in (
        (seen.x0, x0),
        (seen.eps, eps),
        (seen.v, outputs["v_prediction"]),
        (seen.velocity, velocity),
    ):
        torch.testing.assert_close(view, expected, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_time_derivative_of_the_noised_state(vp: VP) -> None:
    t = torch.tensor([10.3, 420.7, 990.2], dtype=torch.float64)
    x0, eps, x_t, outputs = known(vp, t)
    derivative = torch.func.jvp(lambda s: vp.noised(x0, eps, s), (t,), (torch.ones_like(t),))[1]
    velocity = Prediction(outputs["v_prediction"], x_t, t, vp, "v_prediction").velocity
    torch.testing.assert_close(velocity, derivative, rtol=1e-8, atol=1e-12)


def test_velocity_follows_the_probability_flow_of_gaussian_data(vp: VP) -> None:
    """Data N(m, q^2): the flow keeps (x - alpha m) / sqrt(alpha^2 q^2 + sigma^2); its slope is the velocity."""
    mean, spread = 0.7, 0.4
    t = torch.tensor([10.3, 420.7, 990.2], dtype=torch.float64)
    z = torch.randn(3, dtype=torch.float64)

    def state(s: Tensor) -> Tensor:
        return vp.alpha(s) * mean + z * (vp.alpha(s).square() * spread**2 + vp.sigma(s).square()).sqrt()

    x_t = state(t)
    variance = vp.alpha(t).square() * spread**2 + vp.sigma(t).square()
    x0 = mean + vp.alpha(t) * spread**2 / variance * (x_t - vp.alpha(t) * mean)
    step = 1e-4
    slope = (state(t + step) - state(t - step)) / (2 * step)
    velocity = Prediction(x0, x_t, t, vp, "sample").velocity
    torch.testing.assert_close(velocity, slope, rtol=1e-5, atol=1e-10)


def test_views_stay_in_the_state_dtype(vp: VP) -> None:
    t = torch.tensor([519.0], dtype=torch.float64)
    seen = Prediction(torch.randn(1, 4), torch.randn(1, 4), t, vp, "v_prediction")
    assert seen.x0.dtype == seen.eps.dtype == seen.v.dtype == seen.velocity.dtype == torch.float32


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> UNet2DConditionModel:
    network = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet")
    return network.requires_grad_(False).eval()


def state(rows: int = 3) -> tuple[Tensor, Tensor, Condition]:
    condition = Condition(
        {"encoder_hidden_states": torch.randn(rows, 12, 16)},
        {"encoder_hidden_states": torch.zeros(1, 12, 16)},
    )
    return (
        torch.randn(rows, 4, 8, 8),
        torch.tensor([19.0, 519.0, 999.0], dtype=torch.float64)[:rows],
        condition,
    )


def bare(network: UNet2DConditionModel, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return network(x, t.long(), encoder_hidden_states=condition.arguments["encoder_hidden_states"]).sample


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_adapter_gives_the_bare_network_row_by_row(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    seen = UNet2DConditionDenoiser(unet, vp, "epsilon")(x, t, condition)
    assert torch.equal(seen.output, bare(unet, x, t, condition))
    assert seen.features == {} and seen.kind == "epsilon"
    for i in range(3):
        text = Condition(
            {"encoder_hidden_states": condition.arguments["encoder_hidden_states"][i : i + 1]}, {}
        )
        assert relative(seen.output[i : i + 1], bare(unet, x[i : i + 1], t[i : i + 1], text)) < 1e-5


def test_a_half_precision_network_answers_in_the_state_dtype(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    low = copy.deepcopy(unet).to(torch.bfloat16)
    seen = UNet2DConditionDenoiser(low, vp, "epsilon")(x, t, condition)
    assert seen.output.dtype == seen.x0.dtype == torch.float32
    assert relative(seen.output, bare(unet, x, t, condition)) < 0.05


def test_gradients_pass_through_a_frozen_network_to_the_state(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    x.requires_grad_()
    UNet2DConditionDenoiser(unet, vp, "epsilon")(x, t, condition).x0.square().sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 1e-3).all()
    assert all(p.grad is None for p in unet.parameters())


def test_features_are_the_named_outputs_and_leave_no_hook(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    denoiser = UNet2DConditionDenoiser(unet, vp, "epsilon")
    seen = denoiser(x, t, condition, features=("conv_in", "down_blocks.1", "mid_block", "conv_out"))
    assert set(seen.features) == {"conv_in", "down_blocks.1", "mid_block", "conv_out"}
    assert torch.equal(seen.features["conv_in"], unet.conv_in(x))
    assert torch.equal(seen.features["conv_out"], seen.output)
    assert seen.features["down_blocks.1"].shape == seen.features["mid_block"].shape == (3, 32, 4, 4)
    assert not torch.equal(seen.features["down_blocks.1"], seen.features["mid_block"])
    assert not any(m._forward_hooks for m in unet.modules())
    assert torch.equal(denoiser(x, t, condition).output, seen.output)


def test_hooks_are_removed_when_the_call_fails(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    with pytest.raises(AttributeError):
        UNet2DConditionDenoiser(unet, vp, "epsilon")(x, t, condition, features=("mid_block", "no_such_block"))
    with pytest.raises(RuntimeError):
        UNet2DConditionDenoiser(unet, vp, "epsilon")(x[:, :2], t, condition, features=("mid_block",))
    assert not any(m._forward_hooks for m in unet.modules())


def test_weights_stand_in_for_the_parameters_for_one_call(unet: UNet2DConditionModel, vp: VP) -> None:
    """Equal to a second network that holds these weights; the first keeps its own."""
    x, t, condition = state()
    before = {k: p.clone() for k, p in unet.named_parameters()}
    other = copy.deepcopy(unet)
    for p in other.parameters():
        p += 0.05 * torch.randn_like(p)
    denoiser = UNet2DConditionDenoiser(unet, vp, "epsilon")
    own = denoiser(x, t, condition).output
    weights = {k: p.detach() for k, p in other.named_parameters()}
    replaced = denoiser(x, t, condition, weights=weights, features=("mid_block",))
    assert torch.equal(replaced.output, bare(other, x, t, condition))
    assert relative(replaced.output, own) > 0.05
    assert replaced.features["mid_block"].shape == (3, 32, 4, 4)
    assert torch.equal(denoiser(x, t, condition).output, own)
    assert all(torch.equal(p, before[k]) for k, p in unet.named_parameters())


def test_some_weights_replace_only_themselves(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    other = copy.deepcopy(unet)
    other.conv_out.bias += 1.0
    weights = {"conv_out.bias": other.conv_out.bias.detach()}
    denoiser = UNet2DConditionDenoiser(unet, vp, "epsilon")
    assert torch.equal(denoiser(x, t, condition, weights=weights).output, bare(other, x, t, condition))


def test_a_second_time_and_an_unknown_kind_are_refused(unet: UNet2DConditionModel, vp: VP) -> None:
    x, t, condition = state()
    with pytest.raises(ValueError, match="two-time student"):
        UNet2DConditionDenoiser(unet, vp, "epsilon")(x, t, condition, r=t / 2)
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        UNet2DConditionDenoiser(unet, vp, "flow")
