"""What turns pictures into the vectors in which sets of them are compared."""

import torch
from torch import Tensor, nn


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
