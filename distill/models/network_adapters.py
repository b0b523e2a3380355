"""diffusers' networks as denoisers: an adapter for each calling convention."""

from abc import abstractmethod
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from ...pipelines.transformer_two_time import TwoTimeDiT
from ...pipelines.unet_norms import NormedUNet2DConditionModel, NormedUNet2DModel
from ..diffusion.condition import Condition
from ..diffusion.denoiser import Denoiser
from ..diffusion.process import NoiseProcess
from ..errors import UserError

# SDXL's and an IP-Adapter's, which a U-Net takes as one nested argument
ADDED_CONDITIONS = ("text_embeds", "time_ids", "image_embeds")


def nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """Added conditions under added_cond_kwargs, which diffusers' U-Net wants, image_embeds (B, 1, D) as a list with the
    one of its one IP-Adapter; the others as they are."""
    added = {k: arguments[k] for k in ADDED_CONDITIONS if k in arguments}
    if "image_embeds" in added:
        added["image_embeds"] = [added["image_embeds"]]
    flat = {k: v for k, v in arguments.items() if k not in added}
    return {**flat, "added_cond_kwargs": added} if added else flat


class UNet2DConditionDenoiser(Denoiser):
    """Stable Diffusion's calling convention: (sample, timestep, encoder_hidden_states=..., ...).

    Of SDXL, text_embeds and time_ids are entries of the condition like any other.
    """

    network: UNet2DConditionModel

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError("a UNet2DConditionModel has one time; r needs a two-time student")
        dtype = self.network.dtype
        told = nested(condition.to(dtype).arguments)
        return (x_t.to(dtype), t.to(torch.float32)), {**told, "return_dict": False}


class UNet2DDenoiser(Denoiser):
    """The unconditional or class-conditional convention: (sample, timestep, class_labels=...)."""

    network: UNet2DModel

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError("a UNet2DModel has one time; r needs a two-time student")
        return (x_t.to(self.network.dtype), t.to(torch.float32)), {
            **condition.arguments,
            "return_dict": False,
        }


class TwoTimeDenoiser(Denoiser):
    """A network that is told h, the share (t - r) of its process's range, beside t; without r it is 0."""

    network: Any

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        low, high = self.process.t_range
        h = (t - (t if r is None else r)) / (high - low)
        told = self.told(h.to(torch.float32), condition)
        return (x_t.to(self.network.dtype), t.to(torch.float32)), told | {"return_dict": False}

    @abstractmethod
    def told(self, h: Tensor, condition: Condition) -> dict:
        """h (B,) and the condition under the names of the network's arguments."""


class TwoTimeUNetDenoiser(TwoTimeDenoiser):
    """class_embed_type "timestep" of diffusers' UNets: an embedding of class_labels, added to that of t, takes h."""

    def told(self, h: Tensor, condition: Condition) -> dict:
        return {"class_labels": h, **nested(condition.to(self.network.dtype).arguments)}


class TwoTimeDiTDenoiser(TwoTimeDenoiser):
    """(hidden_states, timestep, span, class_labels)."""

    def told(self, h: Tensor, condition: Condition) -> dict:
        return {"span": h, **condition.arguments}


class TransformerDenoiser(Denoiser):
    """Keyword arguments alone: hidden_states, timestep and the condition's entries. t is that of RectifiedFlow.

    `time_scale`: what the network is told of t in [0, 1].
    """

    network: Any
    time_scale = 1000.0

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError(f"a {type(self.network).__name__} has one time; r needs a two-time student")
        dtype = self.network.dtype
        states, positions = self.tokens(x_t.to(dtype), condition)
        time = (self.time_scale * t).to(torch.float32)
        told = {**condition.to(dtype).arguments, **positions, "return_dict": False}
        return (), {"hidden_states": states, "timestep": time, **told}

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t in the network's layout, and the arguments that tell where its parts stand."""
        return x_t, {}


class SD3Denoiser(TransformerDenoiser):
    """SD3Transformer2DModel (arXiv 2403.03206): encoder_hidden_states (B, L, D), pooled_projections (B, P)."""


class FluxDenoiser(TransformerDenoiser):
    """FluxTransformer2DModel: as SD3's and, of a guidance-distilled one, guidance (B,).

    States are (B, C, h, w) with even h and w; the network sees 2 x 2 patches as tokens (B, h w / 4, 4 C).
    """

    time_scale = 1.0

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        patches = x_t.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
        grid = torch.cartesian_prod(*(torch.arange(float(n), device=x_t.device) for n in (rows, columns)))
        length = condition.arguments["encoder_hidden_states"].shape[1]
        positions = {
            "img_ids": torch.nn.functional.pad(grid.view(-1, 2), (1, 0)),
            "txt_ids": torch.zeros(length, 3, device=x_t.device),
        }
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), positions

    def state(self, output: Tensor, x_t: Tensor) -> Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        patches = output.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class WanDenoiser(TransformerDenoiser):
    """WanTransformer3DModel: encoder_hidden_states (B, L, D). States are (B, C, T, h, w), or (B, C, h, w) of pictures,
    which the network sees as videos of one frame."""

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        return x_t.unsqueeze(2) if x_t.ndim == 4 else x_t, {}

    def state(self, output: Tensor, x_t: Tensor) -> Tensor:
        return output.reshape(x_t.shape)


ADAPTERS: dict[type[nn.Module], type[Denoiser]] = {
    UNet2DConditionModel: UNet2DConditionDenoiser,
    UNet2DModel: UNet2DDenoiser,
    NormedUNet2DConditionModel: UNet2DConditionDenoiser,
    NormedUNet2DModel: UNet2DDenoiser,
    TwoTimeDiT: TwoTimeDiTDenoiser,
    SD3Transformer2DModel: SD3Denoiser,
    FluxTransformer2DModel: FluxDenoiser,
    WanTransformer3DModel: WanDenoiser,
}


def takes_span(network: Any) -> bool:
    """Whether the network embeds a second time."""
    return isinstance(network, TwoTimeDiT) or network.config.get("class_embed_type") == "timestep"


def denoiser_of(network: nn.Module, process: NoiseProcess, kind: str) -> Denoiser:
    """The network behind the adapter of its calling convention. Raises UserError for a class without one."""
    adapter = ADAPTERS.get(type(network))
    if adapter in (UNet2DConditionDenoiser, UNet2DDenoiser) and takes_span(network):
        adapter = TwoTimeUNetDenoiser
    if adapter is None:
        known = ", ".join(c.__name__ for c in ADAPTERS)
        raise UserError(f"network: no adapter for a {type(network).__name__}; there are some for {known}")
    return adapter(network, process, kind)
