"""Frozen networks that look at pictures in [-1, 1]: one that describes them in tokens, one that tells two apart."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...pipelines.pipeline_restoration import image_tokens
from ..errors import UserError
from ..metrics.lite import LITE0, LITE2, Lite
from ..models.control_networks import DepthEstimator, EdgeDetector, ImageEmbedder, Unread
from ..models.frozen import Frozen, full_precision
from ..settings import DistanceName

LITES: dict[str, Lite] = {"efflite0": LITE0, "efflite2": LITE2}
LITE_SIZE = 128  # as the extractor efflite0-128 sees pictures
LITE_STAGES = (1, 2, 4, 6)  # those that end at sides of a quarter, an eighth, a sixteenth and a 32nd
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_B16 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 224, "projection_dim": 512,
}  # fmt: skip
CLIP_H14 = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
KNOWN_TOWERS = {
    "openai/clip-vit-base-patch16": CLIP_B16,
    "h94/IP-Adapter/models/image_encoder": CLIP_H14,  # OpenCLIP's ViT-H/14 (laion/CLIP-ViT-H-14-laion2B-s32B-b79K)
}


class ImageEncoder(Frozen):
    """network: what an export has as its image_encoder; image_input: how it sees pictures; num_tokens: N of its
    tokens (B, N, D)."""

    def __init__(self, network: Any, size: int, mean: Sequence[float], std: Sequence[float], num_tokens: int):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.image_input: dict[str, Any] = {"size": size, "mean": list(mean), "std": list(std)}
        self.num_tokens = num_tokens

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return image_tokens(self.network, images.float(), **self.image_input)


class ImageDistance(Frozen):
    """Of pairs of pictures (B, 3, H, W), (B,); differentiable in both."""

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        with full_precision(images):
            return self.distance(images.float(), others.float())

    @abstractmethod
    def distance(self, images: Tensor, others: Tensor) -> Tensor: ...


class LiteDistance(ImageDistance):
    """LPIPS without learnt weights (arXiv 1801.03924, eq. 1 with w = 1): between an EfficientNet-Lite's features of
    four stages, unit vectors at every place, the squared distance is averaged over places and stages; 0 to 4."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        pairs = zip(self.features(images), self.features(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)

    def features(self, images: Tensor) -> list[Tensor]:
        x = F.interpolate(images, (LITE_SIZE, LITE_SIZE), mode="bicubic", antialias=True)
        x = self.network.bn1(self.network.conv_stem(x.contiguous(memory_format=torch.channels_last)))
        out = []
        for i, stage in enumerate(self.network.blocks):
            x = stage(x)
            if i in LITE_STAGES:
                out.append(F.normalize(x, dim=1))
        return out


class LPIPS(ImageDistance):
    """LPIPS of VGG16 in torchmetrics.

    imagenet_first: pictures are moved to [0, 1] and normalised as ImageNet's before the network normalises them again,
    as CodeFormer and InterLCM call it; not the package's own convention.
    """

    def __init__(self, network: nn.Module, imagenet_first: bool):
        super().__init__()
        self.network, self.imagenet_first = network, imagenet_first

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        return self.network(self.seen(images), self.seen(others)).flatten()

    def seen(self, images: Tensor) -> Tensor:
        if not self.imagenet_first:
            return images
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (images / 2 + 0.5 - mean) / std


class Vision:
    """Loads these networks by name."""

    def encoder(self, name: str) -> ImageEncoder:
        """efflite0 and efflite2 from their packages; else a folder or hub id of a CLIPVisionModel. UserError for one
        that cannot be read."""
        if name in LITES:
            return lite_encoder(lite_network(LITES[name]))
        try:
            return clip_encoder(CLIPVisionModel.from_pretrained(name, dtype=torch.float32))
        except Exception as error:  # the hub has errors of its own, the network others
            raise unreadable("method.visual.image_encoder", CLIPVisionModel, name, error) from error

    def embedder(self, name: str) -> ImageEmbedder:
        """efflite0 and efflite2 from their packages; else a folder or hub id, which may go on below the repository, of
        a CLIPVisionModelWithProjection. UserError for one that cannot be read."""
        if name in LITES:
            return lite_embedder(lite_network(LITES[name]))
        place, inside = hub_place(name)
        kind = CLIPVisionModelWithProjection
        try:
            return clip_embedder(kind.from_pretrained(place, subfolder=inside, dtype=torch.float32))
        except Exception as error:
            raise unreadable("method.control.encoder", kind, name, error) from error

    def depth(self, name: str) -> nn.Module:
        """A folder or hub id of one of transformers' depth models. UserError for one that cannot be read."""
        return DepthEstimator.load(name)

    def edges(self, name: str) -> nn.Module:
        """A folder or hub id with ControlNetHED.pth. UserError without it, or without the package controlnet-aux."""
        return EdgeDetector.load(name)

    def distance(self, name: DistanceName) -> ImageDistance:
        if name in LITES:
            return LiteDistance(LITES[name].load())
        try:
            return LPIPS(vgg_lpips(weights=True), name == "lpips-imagenet")
        except OSError as error:
            raise UserError(
                f"method.perceptual: {name} needs torchvision's VGG16, which cannot be fetched "
                f"({' '.join(str(error).split())[:120]}); put vgg16-397923af.pth into "
                f"{torch.hub.get_dir()}/checkpoints, or choose efflite0"
            ) from error


class PlannedVision(Vision):
    """The same architectures without weights, for the meta device; `asked` lists what a run would look up."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encoder(self, name: str) -> ImageEncoder:
        if name in LITES:
            return lite_encoder(TimmWrapperModel(timm_config(LITES[name])))
        return clip_encoder(
            CLIPVisionModel(self._tower(name, "method.visual.image_encoder", CLIPVisionModel))
        )

    def embedder(self, name: str) -> ImageEmbedder:
        if name in LITES:
            return lite_embedder(TimmWrapperModel(timm_config(LITES[name])))
        kind = CLIPVisionModelWithProjection
        return clip_embedder(kind(self._tower(name, "method.control.encoder", kind)))

    def depth(self, name: str) -> nn.Module:
        self.asked.append(f"depth model {name}")
        return Unread()

    def edges(self, name: str) -> nn.Module:
        self.asked.append(f"HED of {name}")
        return Unread()

    def _tower(self, name: str, key: str, kind: Any) -> CLIPVisionConfig:
        self.asked.append(f"image encoder {name}")
        if name in KNOWN_TOWERS:
            return CLIPVisionConfig.from_dict(KNOWN_TOWERS[name])
        place, inside = hub_place(name)
        try:
            return CLIPVisionConfig.from_pretrained(place, subfolder=inside)
        except Exception as error:
            raise unreadable(key, kind, name, error) from error

    def distance(self, name: DistanceName) -> ImageDistance:
        if name in LITES:
            return LiteDistance(LITES[name].planned())
        self.asked.append("VGG16 of torchvision")
        return LPIPS(
            vgg_lpips(weights=False).to("meta"), name == "lpips-imagenet"
        )  # it makes buffers on the CPU


def timm_config(lite: Lite) -> Any:
    return TimmWrapperConfig(architecture=lite.architecture, do_pooling=False)


def lite_network(lite: Lite) -> Any:
    """The package's weights in the class that transformers saves and loads."""
    network = TimmWrapperModel(timm_config(lite))
    weights = lite.unfolded().state_dict()
    network.timm_model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier.")})
    return network


def lite_encoder(network: Any) -> ImageEncoder:
    return ImageEncoder(network, LITE_SIZE, (0.5,) * 3, (0.5,) * 3, (LITE_SIZE // 32) ** 2)


def lite_embedder(network: Any) -> ImageEmbedder:
    return ImageEmbedder(network, network.timm_model.num_features, LITE_SIZE, (0.5,) * 3, (0.5,) * 3)


def clip_embedder(network: Any) -> ImageEmbedder:
    config = network.config
    return ImageEmbedder(network, config.projection_dim, config.image_size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def hub_place(name: str) -> tuple[str, str]:
    """A folder, or owner/name of the hub, and what of the name goes on below it."""
    folder, parts = Path(name).expanduser(), name.split("/")
    return (str(folder), "") if folder.is_dir() else ("/".join(parts[:2]), "/".join(parts[2:]))


def clip_encoder(network: Any) -> ImageEncoder:
    config = network.config
    return ImageEncoder(
        network,
        config.image_size,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
        (config.image_size // config.patch_size) ** 2 + 1,
    )


def vgg_lpips(weights: bool) -> nn.Module:
    """`weights`: VGG16's from torch's hub cache or torchvision's server, the learnt ones from torchmetrics."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(pretrained=weights, net="vgg", pnet_rand=not weights)


def unreadable(key: str, kind: Any, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(
        f"{key}: no {kind.__name__} can be read from {name} ({reason}); give its folder, a hub id such as "
        "openai/clip-vit-base-patch16, or efflite0"
    )
