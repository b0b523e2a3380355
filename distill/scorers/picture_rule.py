"""How a picture reaches a network: resizing, cropping and scaling of tensors, differentiable."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PictureRule:
    """Preprocessing of pictures (B, 3, H, W) in [0, 1] to (B, 3, size, size), normalised.

    fit         "shortest": the shorter side becomes `size`, then the centre is cropped; "squash": both sides do
    kernel      of that resize, antialiased
    lanczos     None, or the side in pixels to which the largest centred square is Lanczos-resized before that

    The filters are those of PIL, so that the result follows open_clip's transform; but nothing is rounded to 8 bits
    between the steps, where PIL rounds after each pass: 0.3 grey levels on average, a few at sharp edges.
    """

    size: int
    fit: Literal["shortest", "squash"]
    kernel: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lanczos: int | None = None

    def __str__(self) -> str:
        """The rule in words, for the protocol."""
        steps = [f"centre square, lanczos {self.lanczos} px"] if self.lanczos else []
        crop = f", centre crop {self.size}" if self.fit == "shortest" else ""
        steps.append(f"{self.fit} to {self.size} px {self.kernel} antialiased{crop}")
        numbers = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return "; ".join([*steps, "clamped, not rounded", "mean {} std {}".format(*numbers)])

    def __call__(self, images: Tensor) -> Tensor:
        """Raises ValueError on pictures that are not finite or leave [0, 1]."""
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("pictures must be finite and lie in [0, 1]: clamp them first")
        x = images
        if self.lanczos:
            x = center_crop(x, min(x.shape[-2:]))
            across = lanczos_matrix(x.shape[-1], self.lanczos).to(x)
            x = (across @ (x @ across.T).clamp(0, 1)).clamp(0, 1)
        height, width = x.shape[-2:]
        short = min(height, width)
        scaled = (self.size, self.size)
        if self.fit == "shortest":
            scaled = (self.size * height // short, self.size * width // short)
        if scaled != (height, width):
            x = F.interpolate(x, scaled, mode=self.kernel, antialias=True).clamp(0, 1)
        x = center_crop(x, self.size)
        mean, std = (
            torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (self.mean, self.std)
        )
        return (x - mean) / std


def center_crop(images: Tensor, side: int) -> Tensor:
    """The centred square of `side` pixels, with torchvision's rounding of the offset."""
    top, left = (round((n - side) / 2) for n in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


@cache
def lanczos_matrix(old: int, new: int) -> Tensor:
    """(new, old) weights of PIL's Lanczos resize, a = 3, widened when it shrinks: x_new = M x, rows sum to one."""
    scale = old / new
    wide = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centre[:, None]) / wide
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return (weights / weights.sum(1, keepdim=True)).float()
