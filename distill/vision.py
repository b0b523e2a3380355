"""Frozen networks that look at pictures in [-1, 1]: one that describes them in tokens, one that tells two apart."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, TimmWrapperConfig, TimmWrapperModel

from ..pipelines.pipeline_restoration import image_tokens
from .errors import UserError
from .metrics.lite import LITE0, LITE2, Lite
from .rewards import CLIP_MEAN, CLIP_STD

DistanceName = Literal["efflite0", "efflite2", "lpips", "lpips-imagenet"]
LITES: dict[str, Lite] = {"efflite0": LITE0, "efflite2": LITE2}
LITE_SIZE = 128  # as the extractor efflite0-128 sees pictures
LITE_STAGES = (1, 2, 4, 6)  # those that end at sides of a quarter, an eighth, a sixteenth and a 32nd
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_B16 = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 224, "projection_dim": 512,
}  # fmt: skip
KNOWN_TOWERS = {"openai/clip-vit-base-patch16": CLIP_B16}


class Frozen(nn.Module):
    """Stays in evaluation mode and without gradients of its own, also as a part of a method that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


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
        kind = images.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
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
            network = TimmWrapperModel(timm_config(LITES[name]))
            weights = LITES[name].unfolded().state_dict()
            network.timm_model.load_state_dict(
                {k: v for k, v in weights.items() if not k.startswith("classifier.")}
            )
            return lite_encoder(network)
        try:
            return clip_encoder(CLIPVisionModel.from_pretrained(name, dtype=torch.float32))
        except Exception as error:  # the hub has errors of its own, the network others
            raise unreadable("method.visual.image_encoder", name, error) from error

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
        self.asked.append(f"image encoder {name}")
        try:
            config = KNOWN_TOWERS.get(name) or CLIPVisionConfig.from_pretrained(name).to_dict()
        except Exception as error:
            raise unreadable("method.visual.image_encoder", name, error) from error
        return clip_encoder(CLIPVisionModel(CLIPVisionConfig.from_dict(config)))

    def distance(self, name: DistanceName) -> ImageDistance:
        if name in LITES:
            return LiteDistance(LITES[name].planned())
        self.asked.append("VGG16 of torchvision")
        return LPIPS(
            vgg_lpips(weights=False).to("meta"), name == "lpips-imagenet"
        )  # it makes buffers on the CPU


def timm_config(lite: Lite) -> Any:
    return TimmWrapperConfig(architecture=lite.architecture, do_pooling=False)


def lite_encoder(network: Any) -> ImageEncoder:
    return ImageEncoder(network, LITE_SIZE, (0.5,) * 3, (0.5,) * 3, (LITE_SIZE // 32) ** 2)


def clip_encoder(network: Any) -> ImageEncoder:
    config = network.config
    return ImageEncoder(
        network, config.image_size, CLIP_MEAN, CLIP_STD, (config.image_size // config.patch_size) ** 2 + 1
    )


def vgg_lpips(weights: bool) -> nn.Module:
    """`weights`: VGG16's from torch's hub cache or torchvision's server, the learnt ones from torchmetrics."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(pretrained=weights, net="vgg", pnet_rand=not weights)


def unreadable(key: str, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(
        f"{key}: no CLIPVisionModel can be read from {name} ({reason}); give its folder, a hub id such as "
        "openai/clip-vit-base-patch16, or efflite0"
    )
