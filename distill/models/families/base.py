"""What every family says of its pipelines."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...diffusion.denoiser import Denoiser
from ...diffusion.process import RectifiedFlow
from ...errors import UserError
from ..codec import Units
from ..network_adapters import denoiser_of

Texts = dict[str, Tensor]


class Family(ABC):
    """component: the pipeline's name of its network; encoders: its text encoders; patch: latents on a side of what the
    network sees as one; embedded_class: runs a network with an embedding of the guidance scale, None where none can;
    control_class: runs one with a ControlNet; takes_times: the call takes `timesteps` or `sigmas`."""

    component = "transformer"
    takes_times = True
    embedded_class: Any = None
    control_class: Any = None
    encoders: tuple[str, ...] = ("text_encoder",)
    optional: tuple[str, ...] = ()  # encoders that the pipeline runs without
    addition: str | None = None  # addition_embed_type of the network
    patch = 1

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, self.component)

    def denoiser(self) -> Denoiser:
        """The network in straight paths. Raises UserError where the scheduler says otherwise."""
        config = self.pipeline.scheduler.config
        kind, steps = config.get("prediction_type", "flow_prediction"), config.num_train_timesteps
        if kind != "flow_prediction" or steps != 1000:
            name = type(self.pipeline).__name__
            raise UserError(
                f"teacher: its scheduler has prediction_type {kind} and {steps} training steps; a {name} here works in "
                "straight paths of 1000; give a teacher with a flow-matching scheduler"
            )
        return denoiser_of(self.network, RectifiedFlow(), "velocity")

    @abstractmethod
    def resolution(self) -> int:
        """Side in pixels where nobody asks for another."""

    @abstractmethod
    def encode(self, captions: list[str], device: torch.device) -> Texts:
        """The text encoders' part of the network's keyword arguments, first dimension that of the captions."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one caption's `encode`, from the configurations alone."""

    def channels(self) -> tuple[int, int]:
        """Of a sample that the network takes, and of what it gives."""
        config = self.network.config
        return config.in_channels, config.out_channels

    @abstractmethod
    def widths(self) -> dict[str, tuple[Any, int]]:
        """By key of the network's configuration: what it is told, and what the text encoders give."""

    def units(self) -> Units:
        """Shift and scale of latents, as the pipeline decodes them: z / scale + shift."""
        config = self.pipeline.vae.config
        return float(config.shift_factor or 0.0), float(config.scaling_factor)

    def empty(self, device: torch.device) -> Texts:
        """What stands in place of `encode` where the prompt is dropped, first dimension 1."""
        return self.encode([""], device)

    def fixed(self, rows: int, resolution: int) -> Texts:
        """Arguments that no prompt changes."""
        return {}

    def call_texts(self, texts: Texts) -> Texts:
        """`encode`'s tensors under the names of the pipeline's call."""
        return {"prompt_embeds" if v.ndim == 3 else "pooled_prompt_embeds": v for v in texts.values()}

    def unpacked(self, latents: Tensor, resolution: int) -> Tensor:
        """What the pipeline gives as output_type "latent", as (B, C, h, w)."""
        return latents

    def unguided(self) -> dict[str, Any]:
        """Arguments of the pipeline's call for a network that needs no guidance by differences."""
        return {"guidance_scale": 1.0}

    def call(self, resolution: int) -> dict[str, Any]:
        """Arguments of the pipeline's own call that give such pictures; {} where they are its defaults."""
        return {} if resolution == self.resolution() else {"height": resolution, "width": resolution}
