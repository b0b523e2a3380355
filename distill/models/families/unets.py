"""Families of U-Nets: Stable Diffusion, its latent consistency models, SDXL."""

from inspect import signature
from typing import Any

import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)

from ...diffusion.denoiser import Denoiser
from ...diffusion.guidance import guidance_embedding
from ...diffusion.process import VP
from ...errors import UserError
from ..codec import Units, vae_scale_factor
from ..network_adapters import denoiser_of
from .base import Family, Texts

UNET_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class StableDiffusion(Family):
    """A U-Net and one CLIP."""

    component = "unet"
    embedded_class = LatentConsistencyModelPipeline
    control_class: Any = StableDiffusionControlNetPipeline

    def denoiser(self) -> Denoiser:
        config = self.pipeline.scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if kind not in UNET_PREDICTIONS or config.get("use_flow_sigmas"):
            flow = " with use_flow_sigmas" if config.get("use_flow_sigmas") else ""
            raise UserError(
                f"teacher: its scheduler has prediction_type {kind}{flow}; a {type(self.pipeline).__name__} here has "
                f"one of {', '.join(UNET_PREDICTIONS)} and no straight paths; give such a teacher"
            )
        process = VP.from_scheduler(config)
        if kind == "epsilon" and process.ends_in_noise:
            raise UserError(
                "teacher: its scheduler ends in pure noise (rescale_betas_zero_snr), where no picture follows from "
                "prediction_type epsilon; give a v_prediction teacher, or a scheduler without the rescaling"
            )
        return denoiser_of(self.network, process, kind)

    def resolution(self) -> int:
        return self.network.config.sample_size * vae_scale_factor(self.pipeline.vae)

    def units(self) -> Units:
        """Without a shift, whatever the autoencoder's configuration names."""
        return 0.0, float(self.pipeline.vae.config.scaling_factor)

    def encode(self, captions: list[str], device: torch.device) -> Texts:
        embeds, _ = self.pipeline.encode_prompt(captions, device, 1, False)
        return {"encoder_hidden_states": embeds}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        text = self.pipeline.text_encoder.config
        return {"encoder_hidden_states": (text.max_position_embeddings, text.hidden_size)}

    def widths(self) -> dict[str, tuple[Any, int]]:
        own = self.network.config.cross_attention_dim
        if not isinstance(own, int) and len(set(own)) == 1:  # one for each block
            own = own[0]
        return {"cross_attention_dim": (own, self.shapes()["encoder_hidden_states"][1])}

    @property
    def guidance(self) -> float | None:
        """The scale that a network with an embedding of it is told, its pipeline's default; None without one."""
        if self.network.config.time_cond_proj_dim is None:
            return None
        return float(signature(type(self.pipeline).__call__).parameters["guidance_scale"].default)

    def fixed(self, rows: int, resolution: int) -> Texts:
        if self.guidance is None:
            return {}
        scale = torch.full((rows,), self.guidance - 1)
        return {"timestep_cond": guidance_embedding(scale, self.network.config.time_cond_proj_dim)}

    def unguided(self) -> dict[str, Any]:
        """A network that is told the scale has no other guidance in its pipeline."""
        return super().unguided() if self.guidance is None else {"guidance_scale": self.guidance}


class LatentConsistency(StableDiffusion):
    """The same with a network that embeds the guidance scale."""


class StableDiffusionXL(StableDiffusion):
    """Two CLIPs, the second one's pooled state, and the sizes of arXiv 2307.01952: no crop, nothing resized."""

    encoders = ("text_encoder", "text_encoder_2")
    addition = "text_time"
    embedded_class = StableDiffusionXLPipeline
    control_class = StableDiffusionXLControlNetPipeline

    def units(self) -> Units:
        """Those of each channel where the autoencoder has both latents_mean and latents_std."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().units()
        return tuple(mean), tuple(config.scaling_factor / s for s in std)

    def encode(self, captions: list[str], device: torch.device) -> Texts:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            captions, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        first, second = self.pipeline.text_encoder.config, self.pipeline.text_encoder_2.config
        return {
            "encoder_hidden_states": (first.max_position_embeddings, first.hidden_size + second.hidden_size),
            "text_embeds": (second.projection_dim,),
        }

    def empty(self, device: torch.device) -> Texts:
        texts = super().empty(device)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return texts
        return {k: torch.zeros_like(v) for k, v in texts.items()}

    def fixed(self, rows: int, resolution: int) -> Texts:
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
        return {**super().fixed(rows, resolution), "time_ids": sizes.expand(rows, -1)}

    def widths(self) -> dict[str, tuple[Any, int]]:
        config = self.network.config
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        told = pooled + 6 * (config.addition_time_embed_dim or 0)
        return {**super().widths(), "projection_class_embeddings_input_dim": (
            config.projection_class_embeddings_input_dim, told
        )}  # fmt: skip
