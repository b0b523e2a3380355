"""Quantisation: torchao's integers against their formulas, exact reopening, bytes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from fewstep.distill.errors import UserError
from fewstep.distill.models.quantise import Scheme, held_bytes, quantised, unfit
from torch import Tensor, nn


def on_grid(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers and dequantised weights: symmetric, scale = amax / (2^(b-1) - 1/2), to the nearest, ties to even."""
    blocks = weight.unflatten(1, (-1, group))
    scale = blocks.abs().amax(2, keepdim=True) / ((2**bits - 1) / 2)
    integers = (blocks * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return integers.flatten(1, 2).to(torch.int8), (integers * scale).flatten(1, 2)


def rows_in_int8(x: Tensor) -> Tensor:
    """Asymmetric int8 of each row of the last axis: scale (max(x, 0) - min(x, 0)) / 255, an integer zero point."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return ((x * (1 / scale)).round().add(zero).clamp(-128, 127) - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(24, 64), (24, 64, 3, 3), (24, 48, 1, 1), (5, 7)])
def test_weights_are_on_the_grid_bit_for_bit(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    ours = Scheme(bits, False).converted(weight)
    group = 32 if bits < 8 and shape[1] % 32 == 0 else shape[1]
    integers, floats = on_grid(weight, bits, group)
    assert torch.equal(ours.qdata, integers)
    assert torch.equal(ours.dequantize(), floats)


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize(("kernel", "channels"), [(1, 64), (3, 64), (3, 48)])
def test_a_convolution_equals_its_formula_bit_for_bit(kernel: int, channels: int, activations: bool) -> None:
    conv = nn.Conv2d(channels, 16, kernel, stride=2, padding=kernel // 2)
    x = torch.randn(2, channels, 8, 8)
    _, weight = on_grid(conv.weight.detach(), 4, 32 if channels % 32 == 0 else channels)
    expected = F.conv2d(rows_in_int8(x) if activations else x, weight, conv.bias, 2, kernel // 2)
    float_output = conv(x)
    conv.weight = nn.Parameter(Scheme(4, activations).converted(conv.weight), requires_grad=False)
    assert torch.equal(conv(x), expected)
    assert 0.02 < (expected - float_output).norm() / float_output.norm() < 0.5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", [False, True])
def test_linear_layers_are_as_the_configuration_says(bits: int, activations: bool) -> None:
    from torchao.quantization import quantize_

    layer = nn.Linear(64, 24)
    x, weight = torch.randn(6, 64), layer.weight.detach()
    expected = F.linear(
        rows_in_int8(x) if activations else x, on_grid(weight, bits, 32 if bits < 8 else 64)[1], layer.bias
    )
    holder = nn.Sequential(layer)
    quantize_(holder, Scheme(bits, activations).linear())
    out = holder(x).detach()
    if bits == 4:
        assert torch.equal(out, expected.detach())
    else:  # amax / 127 or / 127.5, and symmetric activations: within a step or two
        assert 0 < (out - expected).abs().max() < 0.1


def test_a_1x1_convolution_is_the_linear_layer() -> None:
    """With activations of floating point, whose rows are other ones."""
    conv = nn.Conv2d(64, 16, 1)
    linear = Scheme(4, False).converted(conv.weight.detach().flatten(1))
    assert torch.equal(Scheme(4, False).converted(conv.weight).dequantize().flatten(1), linear.dequantize())


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 48), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, norm_num_groups=8,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "unet")
    return tmp_path


def call(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([999, 10]), states).sample


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8", "w4", "w3a8"])
def test_a_quantised_network_opens_again_exactly_and_is_smaller(
    unet: Path, tmp_path: Path, name: str
) -> None:
    full = UNet2DConditionModel.from_pretrained(unet, subfolder="unet")
    error = {}
    for convolutions in (False, True):
        model = quantised(
            UNet2DConditionModel, str(unet), Scheme.of(name), convolutions=convolutions, subfolder="unet"
        )
        error[convolutions] = float((call(model) - call(full)).norm() / call(full).norm())
    assert 0 < error[False] < error[True] < 0.6
    kinds = {type(m.weight).__name__ for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert "Parameter" not in kinds
    model.save_pretrained(tmp_path / "saved")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(call(again), call(model))
    assert held_bytes(again) == held_bytes(model) < held_bytes(full) / 2.5
    sizes = [sum(p.stat().st_size for p in (f).iterdir()) for f in (tmp_path / "saved", unet / "unet")]
    assert sizes[0] < sizes[1] / 2


def test_held_bytes_of_a_plain_module() -> None:
    assert held_bytes(nn.Linear(3, 5)) == 4 * (15 + 5)


def test_held_bytes_of_integers() -> None:
    """Of 24 x 64 weights at 4 bits: a byte each, a float32 scale and a zero point of a byte for every 32 of them."""
    layer = nn.Linear(64, 24, bias=False)
    layer.weight = nn.Parameter(Scheme(4, True).converted(layer.weight), requires_grad=False)
    assert held_bytes(layer) == 24 * 64 + 24 * 2 * (4 + 1)


def test_layers_that_no_group_fits() -> None:
    assert unfit(nn.ModuleDict({"a": nn.Linear(64, 2), "b": nn.Linear(48, 2)})) == ["b"]


@pytest.mark.parametrize("name", ["w9", "int4", "w4a4", "w1a8", ""])
def test_unknown_schemes(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.quantisation: .* is no scheme"):
        Scheme.of(name)
