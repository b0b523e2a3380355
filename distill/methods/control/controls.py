"""What a control sees of a picture: (B, 3, H, W) in [0, 1] to a condition of that shape, a ControlNet's input, or to an
embedding (B, D), an IP-Adapter's.

Each is deterministic in the picture (a mask is drawn apart from it), as noise consistency needs: of a random condition
the boundary loss would forbid any use (arXiv 2506.19741, theorem 1). torch is imported where a picture is looked at:
the settings are read without it.
"""

from __future__ import (
    annotations,  # torch is imported where a picture is looked at: settings are read without it
)

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...errors import UserError
from ...settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from ...diffusion.draws import Draws
    from ...scorers.vision import Vision

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
HIDDEN = -1.0  # of masked pixels, as diffusers' inpainting ControlNets have them

View = Callable[["Tensor", "Draws"], "Tensor"]  # pictures to conditions


class ControlSettings:
    """Of every control; what a class does not say otherwise holds for conditions that are pictures.

    definition  of the error between the conditions of two pictures
    """

    definition: ClassVar[str] = (
        "mean absolute difference of the condition and what the control sees of the picture, pixels in [0, 1]"
    )

    def load(self, vision: Vision) -> View:
        """What looks at pictures, a module where it has weights."""
        return self  # type: ignore[return-value]

    def error(self, wanted: Tensor, seen: Tensor) -> Tensor:
        """Of conditions (B, ...): float64 (B,)."""
        return (wanted - seen).abs().double().mean((1, 2, 3))

    def shown(self, images: Tensor, seen: Tensor) -> Tensor:
        """What a person looks at: a picture of the condition of `images`."""
        return seen

    def record(self) -> dict[str, Any]:
        """As an export's control.json has it."""
        return dict(vars(self))


@settings
class Canny(ControlSettings):
    """Edges of OpenCV's Canny in 0 and 1; thresholds of the gradient on a scale of 0 to 255, as ControlNet's.

    name  which control
    low   gradient below which nothing is an edge
    high  gradient from which everything is an edge
    """

    name: Literal["canny"] = "canny"
    low: int = Field(100, ge=0)
    high: int = Field(200, ge=0)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        import cv2
        import numpy as np
        import torch

        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        edges = np.stack([cv2.Canny(np.ascontiguousarray(p), self.low, self.high) for p in pixels])
        return torch.from_numpy(edges).to(images)[:, None].expand(-1, 3, -1, -1) / 255


@settings
class SoftEdges(ControlSettings):
    """Norm of the Sobel gradient of the blurred luminance, at most 1.

    name  which control
    blur  standard deviation in pixels
    """

    name: Literal["soft_edges"] = "soft_edges"
    blur: float = Field(1.0, gt=0)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        import torch
        import torch.nn.functional as F
        from torchvision.transforms.functional import gaussian_blur

        size = 2 * round(3 * self.blur) + 1
        y = F.pad(
            gaussian_blur(luminance(images), [size, size], [self.blur, self.blur]), (1, 1, 1, 1), "replicate"
        )
        across = y.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        gradient = F.conv2d(y, torch.stack([across, across.T])[:, None])
        return torch.linalg.vector_norm(gradient, dim=1, keepdim=True).clamp(max=1).expand(-1, 3, -1, -1)


@settings
class Luminance(ControlSettings):
    """The picture without its colours.

    name  which control
    """

    name: Literal["luminance"] = "luminance"

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return luminance(images).expand(-1, 3, -1, -1)


@settings
class SuperResolution(ControlSettings):
    """The picture averaged over squares of `factor` pixels, each square in its one colour.

    name    which control
    factor  side of a square in pixels
    """

    name: Literal["superres"] = "superres"
    factor: int = Field(8, ge=2)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        import torch.nn.functional as F

        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            sides = " x ".join(str(n) for n in images.shape[-2:])
            raise UserError(
                f"method.control.factor: {self.factor} does not divide pictures of {sides} pixels"
            )
        return F.interpolate(F.avg_pool2d(images, self.factor), scale_factor=self.factor)


@settings
class Inpainting(ControlSettings):
    """The picture with one rectangle of `HIDDEN`.

    name      which control
    min_side  least side of the rectangle, as a share of the picture's
    max_side  largest side of the rectangle, as a share of the picture's
    """

    name: Literal["inpaint"] = "inpaint"
    min_side: float = Field(0.25, gt=0, le=1)
    max_side: float = Field(0.75, gt=0, le=1)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        import torch

        hidden = torch.ones_like(images[:, :1], dtype=torch.bool)
        for dim in (2, 3):
            side = draws.uniform(self.min_side, self.max_side)
            start = draws.uniform() * (1 - side)
            n = images.shape[dim]
            place = (torch.arange(n, device=images.device) + 0.5) / n
            inside = (place >= start[:, None]) & (place < (start + side)[:, None])
            hidden &= inside.view(-1, 1, *((n, 1) if dim == 2 else (1, n)))
        return torch.where(hidden, HIDDEN, images)


@settings
class Depth(ControlSettings):
    """Relative inverse depth by a model of transformers, near bright.

    name   which control
    model  its folder or hub id
    """

    name: Literal["depth"] = "depth"
    model: str = "depth-anything/Depth-Anything-V2-Small-hf"

    def load(self, vision: Vision) -> View:
        return vision.depth(self.model)


@settings
class HED(ControlSettings):
    """Soft edges of ControlNet's HED (arXiv 1504.06375), by the package controlnet-aux. `soft_edges` needs no weights.

    name   which control
    model  a folder or hub id with ControlNetHED.pth
    """

    name: Literal["hed"] = "hed"
    model: str = "lllyasviel/Annotators"

    def load(self, vision: Vision) -> View:
        return vision.edges(self.model)


@settings
class ImagePrompt(ControlSettings):
    """The picture's embedding.

    name     which control
    encoder  efflite0, efflite2, or a folder or hub id (it may go on below the repository) of a
             CLIPVisionModelWithProjection
    """

    definition: ClassVar[str] = (
        "1 - cosine of the encoder's embeddings of the picture that was shown and of the picture"
    )
    name: Literal["image"] = "image"
    encoder: str = "efflite0"

    def load(self, vision: Vision) -> View:
        return vision.embedder(self.encoder)

    def error(self, wanted: Tensor, seen: Tensor) -> Tensor:
        import torch.nn.functional as F

        return 1 - F.cosine_similarity(wanted.double(), seen.double())

    def shown(self, images: Tensor, seen: Tensor) -> Tensor:
        return images

    def record(self) -> dict[str, Any]:
        """An encoder of a folder by its place in the export, which has a copy."""
        from ....pipelines.ip_adapter import ENCODER_FOLDER

        local = Path(self.encoder).expanduser().is_dir()
        return {**vars(self), "encoder": ENCODER_FOLDER if local else self.encoder}


Spatial = Canny | SoftEdges | Luminance | SuperResolution | Inpainting | Depth | HED
SpatialControl = Annotated[Spatial, Field(discriminator="name")]
Control = Annotated[Spatial | ImagePrompt, Field(discriminator="name")]


def luminance(images: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
