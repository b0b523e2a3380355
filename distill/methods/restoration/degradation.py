"""Synthetic degradation: blur, smaller size, noise, JPEG, back to size (arXiv 2502.02215, as GFPGAN, 2101.04061)."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ...diffusion.draws import Draws
from .settings import DegradationSettings

Picture = np.ndarray  # (H, W, 3), float32 in [0, 1]


class Degradation(DegradationSettings):
    """Degrades pictures by its settings."""

    def small(self, images: Tensor, draws: Draws) -> list[Picture]:
        """Degraded pictures before they are brought back to size; images (B, 3, H, W) in [0, 1]."""
        return [
            self._one(np.ascontiguousarray(p), generator)
            for p, generator in zip(
                images.detach().float().cpu().permute(0, 2, 3, 1).numpy(), draws.generators, strict=True
            )
        ]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Degraded pictures of the same size, (B, 3, H, W) in [-1, 1] as `images`, in steps of 1/255 of the range."""
        if images.is_meta:  # --dry_run has shapes alone
            return torch.empty_like(images)
        small = self.small(images / 2 + 0.5, draws)
        return 2 * enlarged(small, images.shape[-1], cv2.INTER_LINEAR).to(images) - 1

    def _one(self, picture: Picture, generator: torch.Generator) -> Picture:
        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator).item()

        first = second = uniform(*self.blur)
        turn = 0.0
        if uniform(0, 1) < self.anisotropic:
            second, turn = uniform(*self.blur), uniform(-math.pi, math.pi)
        x = cv2.filter2D(picture, -1, gaussian(self.kernel_size, first, second, turn))
        side = max(1, int(len(picture) // uniform(*self.downsample)))
        x = cv2.resize(x, (side, side), interpolation=cv2.INTER_LINEAR)
        noise = torch.randn(x.shape, generator=generator).numpy()
        x = (x + uniform(*self.noise) / 255 * noise).clip(0, 1)
        quality = int(torch.randint(*self.jpeg, (), generator=generator))
        return compressed(x, quality)


HEAVY_RANGES: dict[str, Any] = {
    "blur": (1.0, 15.0), "downsample": (4.0, 30.0), "noise": (0.0, 20.0), "jpeg": (30, 80),
}  # fmt: skip
HEAVY = Degradation(**HEAVY_RANGES)
"""The released code's second set, which its training step makes and leaves unused."""


def gaussian(size: int, first: float, second: float, turn: float) -> np.ndarray:
    """A normalised (size, size) kernel with these standard deviations along axes turned by `turn` radians."""
    places = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(places, places)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    kernel = np.exp(-0.5 * ((along / first) ** 2 + (across / second) ** 2))
    return (kernel / kernel.sum()).astype(np.float32)


def compressed(picture: Picture, quality: int) -> Picture:
    """After a JPEG of this quality."""
    pixels = cv2.cvtColor((255 * picture).round().astype(np.uint8), cv2.COLOR_RGB2BGR)
    code = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(code, cv2.IMREAD_COLOR)
    assert decoded is not None
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.float32) / 255


def enlarged(pictures: Sequence[Picture], side: int, interpolation: int) -> Tensor:
    """(B, 3, side, side) in [0, 1], rounded to 1/255. interpolation: OpenCV's."""
    resized = [cv2.resize(p, (side, side), interpolation=interpolation) for p in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    return (255 * pixels).round().clamp(0, 255) / 255
