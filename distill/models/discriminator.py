"""A discriminator of latents made from the teacher's own U-Net (SCott, arXiv 2403.01505)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.condition import Condition
from ..diffusion.denoiser import Denoiser
from ..settings import LORA_TARGETS

DECODER = "up_blocks"


class Discriminator(nn.Module):
    """D(x, t, condition) -> logits of patches (B, 1, h, w): the U-Net with a LoRA in its decoder and a new last layer.

    The network itself is no part of this module: each call is given the frozen teacher's denoiser, and evaluates it
    with decoder weights W + B A, so that one network serves both. B starts at zero. The head reads the output of the
    last decoder block.
    """

    def __init__(self, network: nn.Module, rank: int, targets: Sequence[str] = LORA_TARGETS):
        super().__init__()
        config: Any = network.config
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in decoder_weights(network, targets):
            out, inner = weight.shape[0], weight.shape[1:].numel()
            first = torch.empty(rank, inner)
            nn.init.kaiming_uniform_(first, a=5**0.5)
            self.down[name.replace(".", "/")] = nn.Parameter(first)
            self.up[name.replace(".", "/")] = nn.Parameter(torch.zeros(out, rank))
        width = config.block_out_channels[0]
        self.head = nn.Sequential(
            nn.GroupNorm(config.norm_num_groups, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )
        self.feature = f"{DECODER}.{len(config.up_block_types) - 1}"

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """W + B A of each adapted layer, by the name of its weight in `network`."""
        adapted = {}
        for key, down in self.down.items():
            name = key.replace("/", ".")
            weight = network.get_parameter(name)
            adapted[name] = (weight.float() + (self.up[key] @ down).view_as(weight)).to(weight.dtype)
        return adapted

    def forward(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with no_recomputation(denoiser.network):
            seen = denoiser(x, t, condition, features=(self.feature,), weights=self.weights(denoiser.network))
        return self.head(seen.features[self.feature].float())


def decoder_weights(network: nn.Module, targets: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Weights of the decoder's linear and convolutional layers whose names end in one of `targets`."""
    found = []
    for name, module in network.named_modules():
        layer = name.removesuffix(".base_layer")  # where a LoRA student has wrapped it
        named = any(layer.endswith(f".{target}") for target in targets)
        if named and name.startswith(f"{DECODER}.") and isinstance(module, nn.Linear | nn.Conv2d):
            found.append((f"{name}.weight", module.weight))
    return found


@contextmanager
def no_recomputation(network: Any) -> Iterator[None]:
    """Without gradient checkpointing, whose second pass would see the network's own weights again."""
    if not network.is_gradient_checkpointing:
        yield
        return
    network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        network.enable_gradient_checkpointing()
