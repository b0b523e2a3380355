"""Preprocessing of tensors against PIL and torchvision, which open_clip's own transform uses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from fewstep.distill.scorers.picture_rule import PictureRule, lanczos_matrix
from PIL import Image
from torch import Tensor

PLAIN = PictureRule(224, "shortest", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SIZES = [(32, 32), (512, 512), (300, 200), (201, 300)]


def photo(height: int, width: int) -> Tensor:
    """uint8 (1, 3, H, W) with edges and gradients, out of coarse noise."""
    coarse = torch.rand(1, 3, height // 5 + 1, width // 5 + 1)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    x[..., : height // 2, : width // 3] = 1.0
    return (x * 255).round().byte()


def levels(got: Tensor, expected: Image.Image) -> Tensor:
    """Absolute differences in grey levels."""
    return (got[0] * 255 - torch.from_numpy(np.array(expected)).permute(2, 0, 1)).abs()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_shortest_side_and_crop_follow_torchvision_on_pil(size: tuple[int, int], kernel: str) -> None:
    x = photo(*size)
    mode = TF.InterpolationMode(kernel)
    expected = TF.center_crop(TF.resize(TF.to_pil_image(x[0]), 224, mode), 224)
    off = levels(replace(PLAIN, kernel=kernel)(x.float() / 255), expected)
    assert off.mean() < 0.5 and off.max() < 8


@pytest.mark.parametrize("size", SIZES)
def test_squashing_follows_pil(size: tuple[int, int]) -> None:
    x = photo(*size)
    expected = TF.to_pil_image(x[0]).resize((224, 224), Image.Resampling.BICUBIC)
    off = levels(replace(PLAIN, fit="squash")(x.float() / 255), expected)
    assert off.mean() < 0.5 and off.max() < 8


@pytest.mark.parametrize("size", SIZES)
def test_lanczos_of_the_centre_square_follows_pil(size: tuple[int, int]) -> None:
    x = photo(*size)
    square = TF.center_crop(TF.to_pil_image(x[0]), min(size))
    expected = square.resize((256, 256), Image.Resampling.LANCZOS)
    rule = replace(PLAIN, size=256, lanczos=256)
    off = levels(rule(x.float() / 255), expected)
    assert off.mean() < 0.5 and off.max() < 4
    if size[0] != size[1]:
        assert levels(replace(rule, lanczos=None)(x.float() / 255), expected).mean() > 0.2


@pytest.mark.parametrize(("old", "new"), [(512, 256), (100, 256), (256, 256)])
def test_lanczos_keeps_constants_and_the_identity(old: int, new: int) -> None:
    matrix = lanczos_matrix(old, new)
    assert (matrix.sum(1) - 1).abs().max() < 1e-6
    assert old != new or (matrix - torch.eye(old)).abs().max() < 1e-6


def test_values_are_normalised_last_and_the_rule_says_so() -> None:
    rule = PictureRule(8, "squash", "bicubic", (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), 16)
    out = rule(torch.full((1, 3, 5, 9), 0.6))
    assert torch.allclose(out[0, :, 3, 4], torch.tensor([1.0, 1.6, 0.15]), atol=1e-5)
    assert str(rule) == (
        "centre square, lanczos 16 px; squash to 8 px bicubic antialiased; clamped, not rounded; "
        "mean 0.1 0.2 0.3 std 0.5 0.25 2"
    )
    assert "centre crop 8" in str(replace(rule, fit="shortest"))


def test_every_pixel_of_the_kept_part_has_a_gradient() -> None:
    rule = PictureRule(8, "shortest", "bicubic", (0.5,) * 3, (0.5,) * 3, 12)
    x = torch.rand(1, 3, 16, 20).mul(0.5).add(0.25).requires_grad_()
    (gradient,) = torch.autograd.grad(rule(x).sum(), x)
    assert (gradient[..., 2:18] != 0).all()
    assert (gradient[..., :2] == 0).all() and (gradient[..., 18:] == 0).all()


@pytest.mark.parametrize("value", [-0.1, 1.1, torch.nan, torch.inf])
def test_pictures_out_of_range_are_refused(value: float) -> None:
    x = torch.full((1, 3, 8, 8), 0.5)
    x[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"finite and lie in \[0, 1\]"):
        PLAIN(x)
