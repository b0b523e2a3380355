"""What is trained beside a frozen one-step generator: a ControlNet, or for image prompts an IP-Adapter."""

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn

from ....pipelines.export import in_float32
from ....pipelines.ip_adapter import IPAdapterFiles
from ...diffusion.condition import Condition
from ...errors import UserError
from ...models.control_networks import ImageEmbedder
from ...models.one_step import OneStep, controlnet_of, residuals
from .controls import View

IMAGE_TOKENS = 4  # all that diffusers' loader knows of an IP-Adapter with a pooled embedding


class ControlAdapter(ABC):
    """Its injection starts at zero, so that the first samples are the frozen generator's whatever the condition.

    name      of the trained module in a method, and so in checkpoints
    module    the trained weights, float32
    network   the frozen U-Net that gradients pass through
    """

    name: ClassVar[str]
    module: nn.Module
    network: nn.Module

    @abstractmethod
    def __call__(self, noise: Tensor, told: Condition, seen: Tensor) -> Tensor:
        """Controlled latents (B, C, h, w); seen: conditions of as many pictures."""

    @abstractmethod
    def pipeline(self) -> Any:
        """What diffusers opens the generator as."""

    def beside(self) -> list[Any]:
        """What is saved into the pipeline's folder."""
        return []


class ControlNetAdapter(ControlAdapter):
    """Residuals of a copy of the U-Net's encoder that sees a picture (B, 3, H, W) (arXiv 2302.05543)."""

    name = "controlnet"

    def __init__(self, generator: OneStep):
        self.generator, self.network = generator, generator.network
        self.module = controlnet_of(generator.teacher)

    def __call__(self, noise: Tensor, told: Condition, seen: Tensor) -> Tensor:
        added = residuals(self.module, noise, self.generator.times(noise), told, seen)
        return self.generator(noise, told.with_(**added))

    def pipeline(self) -> Any:
        teacher = self.generator.teacher
        return teacher.assembled(
            in_float32({"unet": self.network})["unet"],
            teacher.family.control_class,
            controlnet=self.module,
            scheduler=self.generator.scheduler,
        )


class IPAdapter(ControlAdapter):
    """Cross-attention of its own to tokens of a picture's embedding (B, D), beside that to the text (arXiv 2308.06721).

    diffusers' attention processors stand in a second U-Net that shares the frozen one's parameters: the generator
    itself has no adapter to switch off. Keys start as those of the text (as the authors' training script has them),
    values at zero.
    """

    name = "ip_adapter"

    def __init__(self, generator: OneStep, embedder: ImageEmbedder):
        own = generator.network
        if not isinstance(own, UNet2DConditionModel) or own.encoder_hid_proj is not None:
            raise UserError(
                f"teacher.path: {generator.teacher.path} has a {type(own).__name__} that takes no IP-Adapter of "
                "diffusers; image prompts need a U-Net of Stable Diffusion"
            )
        self.generator, self.embedder = generator, embedder
        self.network: Any = sharing(own)
        self.network._load_ip_adapter_weights([fresh_weights(own, embedder.width)], low_cpu_mem_usage=False)
        self.network.enable_xformers_memory_efficient_attention = no_xformers
        self.prompted = generator.through(self.network)
        (self.projection,) = self.network.encoder_hid_proj.image_projection_layers
        layers = [p for p in self.network.attn_processors.values() if hasattr(p, "to_k_ip")]
        self.layers = nn.ModuleList(layers)
        parts = nn.ModuleDict({"image_proj": self.projection, "layers": self.layers})
        self.module = parts.float().requires_grad_(True)

    def __call__(self, noise: Tensor, told: Condition, seen: Tensor) -> Tensor:
        return self.prompted(noise, told.with_(image_embeds=seen[:, None]))

    def pipeline(self) -> Any:
        """Of the generator's own class; `beside` is what its load_ip_adapter adds."""
        network = in_float32({"unet": self.generator.network})["unet"]
        return self.generator.teacher.assembled(network, scheduler=self.generator.scheduler)

    def beside(self) -> list[Any]:
        weights = {f"image_proj.{theirs(k)}": v for k, v in self.projection.state_dict().items()}
        for i, layer in enumerate(self.layers):
            for k, v in layer.state_dict().items():  # to_k_ip.0.weight: of the first adapter
                weights[f"ip_adapter.{2 * i + 1}.{k.replace('.0.', '.')}"] = v
        encoder = self.embedder
        return [
            IPAdapterFiles({k: v.clone() for k, v in weights.items()}, encoder.network, encoder.image_input)
        ]


def adapter_of(generator: OneStep, view: View) -> ControlAdapter:
    """An IP-Adapter where the control sees an embedding, else a ControlNet. UserError for networks without either."""
    return IPAdapter(generator, view) if isinstance(view, ImageEmbedder) else ControlNetAdapter(generator)


def sharing(network: nn.Module) -> Any:
    """A network of its own modules and the same parameters."""
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


@torch.no_grad()
def fresh_weights(network: UNet2DConditionModel, width: int) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's state dict in the layout of its authors, whose layers count by odd numbers."""
    projection = ImageProjection(width, network.config.cross_attention_dim, IMAGE_TOKENS)
    names = [k.removesuffix(".processor") for k in network.attn_processors if k.endswith("attn2.processor")]
    layers = {}
    for i, name in enumerate(names):
        keys = network.get_submodule(name).to_k.weight
        layers[f"{2 * i + 1}.to_k_ip.weight"] = keys
        layers[f"{2 * i + 1}.to_v_ip.weight"] = torch.zeros_like(keys)
    return {
        "image_proj": {theirs(k): v for k, v in projection.state_dict().items()},
        "ip_adapter": layers,
    }


def theirs(key: str) -> str:
    """The authors' name of a parameter of diffusers' ImageProjection."""
    return key.replace("image_embeds", "proj")


def no_xformers() -> None:
    """diffusers would put copies in place of the trained attention processors."""
    raise NotImplementedError("an IP-Adapter is trained with torch's own attention")
