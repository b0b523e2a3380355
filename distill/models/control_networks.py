"""Frozen networks that controls look through: pictures (B, 3, H, W) in [0, 1] to what the adapter is told."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pipelines.pipeline_restoration import encoder_input
from ..diffusion.draws import Draws
from ..errors import UserError
from .frozen import Frozen, full_precision

HED_FILE = "ControlNetHED.pth"
HED_SIDE = 64  # controlnet-aux rounds sides to multiples of it


class ImageEmbedder(Frozen):
    """A picture's embedding (B, width): CLIP's projected one, or the mean over places of a convolutional network's last
    features.

    network: what an export has as its image encoder; image_input: how it sees pictures
    """

    def __init__(self, network: Any, width: int, size: int, mean: Any, std: Any):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.width = width
        self.image_input: dict[str, Any] = {"size": size, "mean": list(mean), "std": list(std)}

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        with full_precision(images):
            out = self.network(encoder_input(images.float(), **self.image_input))
        return out.last_hidden_state.mean((2, 3)) if out.get("image_embeds") is None else out.image_embeds


class DepthEstimator(Frozen):
    """Relative inverse depth, near bright, each picture's from 0 to 1."""

    def __init__(self, network: Any, processor: Any):
        super().__init__()
        self.network, self.processor = network.requires_grad_(False).eval(), processor

    @classmethod
    def load(cls, name: str) -> "DepthEstimator":
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            network = AutoModelForDepthEstimation.from_pretrained(name, dtype=torch.float32)
            return cls(network, AutoImageProcessor.from_pretrained(name))
        except Exception as error:  # the hub has errors of its own, the network others
            raise UserError(
                f"method.control.model: no depth model can be read from {name} ({reason(error)}); give its folder or "
                "a hub id such as depth-anything/Depth-Anything-V2-Small-hf"
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        seen = self.processor(images=list(images.float()), do_rescale=False, return_tensors="pt")
        with full_precision(images):
            depth = self.network(seen["pixel_values"].to(images.device)).predicted_depth[:, None]
        depth = F.interpolate(depth, images.shape[-2:], mode="bilinear", align_corners=False)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        return ((depth - low) / (high - low).clamp(min=torch.finfo(depth.dtype).tiny)).expand(-1, 3, -1, -1)


class EdgeDetector(Frozen):
    """Soft edges of the HED that ControlNet's authors trained, by controlnet-aux, in steps of 1/255."""

    def __init__(self, detector: Any):
        super().__init__()
        self.network = detector.netNetwork.requires_grad_(False).eval()
        self.detector = detector

    @classmethod
    def load(cls, name: str) -> "EdgeDetector":
        try:
            from controlnet_aux import HEDdetector
        except ImportError as error:
            raise UserError(
                f"method.control.name: hed needs controlnet-aux ({reason(error)}); pip install 'fewstep[controls]', or "
                "choose soft_edges"
            ) from error
        try:
            return cls(HEDdetector.from_pretrained(name, filename=HED_FILE))
        except Exception as error:
            raise UserError(
                f"method.control.model: no {HED_FILE} can be read from {name} ({reason(error)}); give its folder or "
                "lllyasviel/Annotators"
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        side = max(HED_SIDE, min(height, width))
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        with full_precision(images):
            found = [self.detector(p, side, side, output_type="np")[..., 0] for p in pixels]
        edges = torch.from_numpy(np.stack(found)).to(images)[:, None] / 255
        seen = F.interpolate(edges, (height, width), mode="bilinear", align_corners=False)
        return seen.expand(-1, 3, -1, -1)


class Unread(nn.Module):
    """In place of a network whose weights a plan does not read: a condition of the same shape."""

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        return torch.zeros_like(images)


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
