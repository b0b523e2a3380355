"""Frozen networks that look at pictures: distances by hand, loading by name, plans without weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.scorers.vision import LPIPS, ImageEncoder, PlannedVision, Vision, vgg_lpips
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
OTHERS = (PICTURES + 0.3 * torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)


@pytest.fixture(scope="module")
def lite() -> Iterator[nn.Module]:
    yield Vision().distance("efflite0")


def test_lite_distance_by_hand(lite: nn.Module) -> None:
    """Features of timm's own network, cosines instead of squared distances."""
    network = EfficientNetLite0().network

    def stages(images: Tensor) -> list[Tensor]:
        x = F.interpolate(images, (128, 128), mode="bicubic", antialias=True)
        return network.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)

    expected = torch.stack([
        (2 - 2 * F.cosine_similarity(a, b)).mean((1, 2))
        for a, b in zip(stages(PICTURES), stages(OTHERS), strict=True)
    ]).mean(0)  # fmt: skip
    found = lite(PICTURES, OTHERS)
    assert [a.shape[-1] for a in stages(PICTURES)] == [32, 16, 8, 4]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert lite(PICTURES, PICTURES).abs().max() < 1e-6 and found.min() > 0.05 and found.max() < 4


def test_a_distance_grows_with_the_damage_and_has_a_gradient(lite: nn.Module) -> None:
    blurred = [F.interpolate(F.avg_pool2d(PICTURES, k), 32, mode="bilinear") for k in (2, 8)]
    near, far = (lite(PICTURES, b).mean().item() for b in blurred)
    assert near < far
    moved = OTHERS.clone().requires_grad_(True)
    lite(moved, PICTURES).mean().backward()
    assert moved.grad is not None and moved.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in lite.parameters())
    assert not lite.train().training


def test_lpips_sees_pictures_as_the_released_code_shows_them() -> None:
    """Moved to [0, 1] and normalised as ImageNet's first; the package's own convention is [-1, 1]."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen[:] = [a, b]
            return torch.zeros(len(a), 1, 1, 1)

    LPIPS(Spy(), imagenet_first=False)(PICTURES, OTHERS)
    assert torch.equal(seen[0], PICTURES) and torch.equal(seen[1], OTHERS)
    assert LPIPS(Spy(), imagenet_first=True)(PICTURES, OTHERS).shape == (3,)
    white = LPIPS(Spy(), imagenet_first=True)
    white(torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2))
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(
        [(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    )
    assert seen[1][0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


@pytest.mark.slow
def test_lpips_of_a_network_without_weights() -> None:
    distance = LPIPS(vgg_lpips(weights=False), imagenet_first=True)
    moved = OTHERS.clone().requires_grad_(True)
    out = distance(moved, PICTURES)
    assert out.shape == (3,) and distance(PICTURES, PICTURES).abs().max() < 1e-6
    out.sum().backward()
    assert moved.grad is not None and moved.grad.abs().max() > 0


def test_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"method.perceptual: lpips needs torchvision's VGG16.*no route"):
        Vision().distance("lpips")
    with pytest.raises(
        UserError, match=r"method.visual.image_encoder: no CLIPVisionModel can be read from n"
    ):
        Vision().encoder("nobody/nothing")


def test_encoders_by_name(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
        image_size=8,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    clip = Vision().encoder(str(tmp_path / "clip"))
    assert clip(PICTURES).shape == (3, 5, 16) and clip.num_tokens == 5
    assert clip.image_input["size"] == 8 and clip.image_input["mean"][0] == pytest.approx(0.48145466)
    lite = Vision().encoder("efflite0")
    tokens = lite(PICTURES)
    assert tokens.shape == (3, 16, 1280) and lite.num_tokens == 16
    pooled = EfficientNetLite0().features(PICTURES / 2 + 0.5)
    torch.testing.assert_close(tokens.mean(1), pooled, rtol=1e-3, atol=1e-3)  # folded norms round differently
    for encoder in (clip, lite.train()):
        assert not any(m.training for m in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())
    assert not clip(PICTURES.clone().requires_grad_(True)).requires_grad


def test_plans_read_nothing() -> None:
    vision = PlannedVision()
    with torch.device("meta"):
        clip = vision.encoder("openai/clip-vit-base-patch16")
        lite, near, far = vision.encoder("efflite0"), vision.distance("efflite2"), vision.distance("lpips")
        images = torch.empty(2, 3, 64, 64)
        assert clip(images).shape == (2, 197, 768) and lite(images).shape == (2, 16, 1280)
        assert near(images, images).shape == (2,) and far(images, images).shape == (2,)
    assert vision.asked == ["image encoder openai/clip-vit-base-patch16", "VGG16 of torchvision"]
    assert isinstance(clip, ImageEncoder) and clip.num_tokens == 197
    assert sum(p.numel() for p in clip.parameters()) == 85_799_424
