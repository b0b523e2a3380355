"""Degradation: each of its pieces by hand, its seeds, its two published sets."""

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.degradation import HEAVY, Degradation, compressed, enlarged, gaussian
from torch import Tensor

NOTHING = Degradation(kernel_size=1, downsample=(1.0, 1.0), noise=(0.0, 0.0), jpeg=(100, 101))
PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def smooth(side: int = 32) -> Tensor:
    """(2, 3, side, side) in [-1, 1], without high frequencies."""
    x = torch.linspace(0, 2 * math.pi, side)
    one = torch.stack([x.sin()[:, None] * x.cos(), x.cos()[:, None] * x.cos(), x.sin()[:, None] + 0 * x])
    return 0.4 * torch.stack([one, one.flip(0)])


def degraded(settings: Degradation, images: Tensor, seed: int = 0) -> Tensor:
    return settings(images, Draws(seed, 0, range(len(images))))


def only(**changes: object) -> Degradation:
    return dataclasses.replace(NOTHING, **changes)


def test_published_sets() -> None:
    """Spec section 2: FFHQ at 512 pixels, and the heavier set."""
    assert Degradation() == Degradation(41, 0.5, (0.1, 10.0), (1.0, 12.0), (0.0, 15.0), (60, 100))
    assert (HEAVY.kernel_size, HEAVY.blur, HEAVY.downsample) == (41, (1.0, 15.0), (4.0, 30.0))
    assert (HEAVY.noise, HEAVY.jpeg) == ((0.0, 20.0), (30, 80))


def test_without_any_degradation_a_picture_stays() -> None:
    """But for what a JPEG of quality 100 loses, chroma at half the resolution most of all."""
    assert (degraded(NOTHING, smooth()) - smooth()).abs().max() < 0.08


def test_kernels_have_their_moments() -> None:
    for first, second, turn in ((2.0, 2.0, 0.0), (1.0, 3.0, 0.0), (1.0, 3.0, 0.6)):
        kernel = gaussian(41, first, second, turn).astype(float)
        places = np.arange(41) - 20
        x, y = np.meshgrid(places, places)
        moments = [(kernel * m).sum() for m in (x, y, x * x, y * y, x * y)]
        c, s = math.cos(turn), math.sin(turn)
        expected = [
            0, 0, c * c * first**2 + s * s * second**2, s * s * first**2 + c * c * second**2,
            c * s * (first**2 - second**2),
        ]  # fmt: skip
        assert kernel.sum() == pytest.approx(1, abs=1e-6)
        assert moments == pytest.approx(expected, abs=2e-3)


def test_blur_takes_what_a_gaussian_takes() -> None:
    """A wave of frequency k keeps exp(-(k sigma)^2 / 2) of its height."""
    k, sigma = 2 * math.pi / 16, 2.0
    wave = (0.5 * torch.cos(k * torch.arange(64.0))).expand(1, 3, 64, 64).contiguous()
    out = degraded(only(kernel_size=21, blur=(sigma, sigma), anisotropic=0.0), wave)
    height = (out[0, 0, 32, 16:48] * wave[0, 0, 0, 16:48]).sum() / wave[0, 0, 0, 16:48].square().sum()
    assert height.item() == pytest.approx(math.exp(-((k * sigma) ** 2) / 2), abs=0.02)


def test_share_of_anisotropic_blurs() -> None:
    """A point blurred along two turned axes is no longer alike in x and y."""
    point = torch.full((40, 3, 33, 33), -1.0)
    point[..., 16, 16] = 1
    for share, least, most in ((0.0, 0, 0), (0.5, 8, 20), (1.0, 25, 40)):
        out = degraded(only(kernel_size=21, blur=(0.5, 3.0), anisotropic=share), point)
        uneven = ((out - out.mT).abs().amax((1, 2, 3)) > 0.01).sum().item()
        assert least <= uneven <= most


def test_a_smaller_size_and_back() -> None:
    settings = only(downsample=(4.0, 4.0))
    small = settings.small(PICTURES / 2 + 0.5, Draws(0, 0, range(3)))
    assert {p.shape for p in small} == {(8, 8, 3)}
    expected = cv2.resize(
        (PICTURES[0] / 2 + 0.5).permute(1, 2, 0).numpy(), (8, 8), interpolation=cv2.INTER_LINEAR
    )
    assert np.abs(small[0] - compressed(expected, 100)).max() == 0
    assert torch.equal(degraded(settings, PICTURES), 2 * enlarged(small, 32, cv2.INTER_LINEAR) - 1)
    sides = {
        len(p)
        for p in only(downsample=(1.0, 4.0)).small(
            PICTURES[:1].expand(60, -1, -1, -1), Draws(0, 0, range(60))
        )
    }
    assert min(sides) == 8 and max(sides) > 26 and len(sides) > 10


def test_noise_has_its_size() -> None:
    grey = torch.zeros(8, 3, 64, 64)
    out = degraded(only(noise=(25.0, 25.0)), grey)
    deviation = (out / 2 * 255)[:, 1].std().item()  # green: chroma is averaged over 2 x 2 pixels
    assert 0.5 * 25 < deviation < 1.02 * 25
    spread = (degraded(only(noise=(0.0, 25.0)), grey) / 2 * 255)[:, 1].flatten(1).std(1)
    assert spread.min() < 10 and spread.max() > 10 and spread.max() < 26


def test_jpeg_keeps_colours_in_their_order_and_loses_with_quality() -> None:
    red = np.zeros((16, 16, 3), np.float32)
    red[..., 0] = 1
    assert np.abs(compressed(red, 95) - red).max() < 0.02
    rough = (PICTURES[0] / 2 + 0.5).permute(1, 2, 0).numpy()
    losses = [np.abs(compressed(rough, q) - rough).mean() for q in (95, 60, 10)]
    assert losses[0] < losses[1] < losses[2]
    out = degraded(only(jpeg=(10, 11)), PICTURES)
    assert (out - PICTURES).abs().mean() > (degraded(NOTHING, PICTURES) - PICTURES).abs().mean() + 0.05


def test_a_rows_degradation_is_its_own() -> None:
    """The same in any batch, another for another seed; outputs are 8-bit."""
    settings = Degradation(kernel_size=13, blur=(0.1, 1.5), downsample=(1.0, 4.0))
    whole = degraded(settings, PICTURES)
    split = torch.cat([settings(PICTURES[i : i + 1], Draws(0, 0, [i])) for i in range(3)])
    assert torch.equal(whole, split)
    assert not torch.equal(whole, degraded(settings, PICTURES, seed=1))
    assert whole.shape == PICTURES.shape and whole.dtype == torch.float32
    levels = (whole / 2 + 0.5) * 255
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.min() >= 0 and levels.max() <= 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 4}, r"method.degradation.kernel_size: 4 is even"),
        ({"blur": (2.0, 1.0)}, r"method.degradation.blur: \[2.0, 1.0\] is no range"),
        ({"blur": (0.0, 1.0)}, r"method.degradation.blur"),
        ({"downsample": (0.5, 1.0)}, r"method.degradation.downsample"),
        ({"noise": (-1.0, 1.0)}, r"method.degradation.noise"),
        ({"jpeg": (60, 60)}, r"method.degradation.jpeg"),
        ({"jpeg": (60, 102)}, r"method.degradation.jpeg"),
    ],
)
def test_what_no_picture_can_have_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        only(**change).check("method.degradation")
    NOTHING.check("method.degradation")
