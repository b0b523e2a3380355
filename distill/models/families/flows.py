"""Families of rectified flows with transformers: Stable Diffusion 3, Flux, Wan."""

from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..codec import Units, vae_scale_factor
from .base import Family, Texts


class StableDiffusion3(Family):
    """Two CLIPs and a T5, whose states follow theirs; without the T5 they are zeros."""

    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    tokens = 256  # the pipeline's default

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self.patch = self.network.config.patch_size

    def resolution(self) -> int:
        return self.network.config.sample_size * vae_scale_factor(self.pipeline.vae)

    def encode(self, captions: list[str], device: torch.device) -> Texts:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.network.config, self.pipeline.text_encoder.config
        return {
            "encoder_hidden_states": (
                clip.max_position_embeddings + self.tokens,
                config.joint_attention_dim,
            ),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def widths(self) -> dict[str, tuple[Any, int]]:
        own, pipe = self.network.config, self.pipeline
        pooled = sum(e.config.projection_dim for e in (pipe.text_encoder, pipe.text_encoder_2))
        t5 = own.joint_attention_dim if pipe.text_encoder_3 is None else pipe.text_encoder_3.config.d_model
        return {
            "joint_attention_dim": (own.joint_attention_dim, t5),
            "pooled_projection_dim": (own.pooled_projection_dim, pooled),
        }


class Flux(Family):
    """A T5's states and a CLIP's pooled one; a guidance-distilled network is told the pipeline's default scale."""

    encoders = ("text_encoder", "text_encoder_2")
    patch = 2
    guidance = 3.5  # FluxPipeline's default

    @property
    def tokens(self) -> int:
        """As the model cards of FLUX.1-dev and, without guidance, FLUX.1-schnell call the pipeline."""
        return 512 if self.network.config.guidance_embeds else 256

    def channels(self) -> tuple[int, int]:
        """Of latents, which the network sees in patches."""
        config = self.network.config
        return config.in_channels // self.patch**2, (
            config.out_channels or config.in_channels
        ) // self.patch**2

    def widths(self) -> dict[str, tuple[Any, int]]:
        own, pipe = self.network.config, self.pipeline
        return {
            "joint_attention_dim": (own.joint_attention_dim, pipe.text_encoder_2.config.d_model),
            "pooled_projection_dim": (own.pooled_projection_dim, pipe.text_encoder.config.hidden_size),
        }

    def resolution(self) -> int:
        return self.pipeline.default_sample_size * vae_scale_factor(self.pipeline.vae)

    def encode(self, captions: list[str], device: torch.device) -> Texts:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            captions, None, device, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        return {
            "encoder_hidden_states": (self.tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def fixed(self, rows: int, resolution: int) -> Texts:
        if not self.network.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((rows,), self.guidance)}

    def unpacked(self, latents: Tensor, resolution: int) -> Tensor:
        factor = vae_scale_factor(self.pipeline.vae)
        return self.pipeline._unpack_latents(latents, resolution, resolution, factor)

    def unguided(self) -> dict[str, Any]:
        """The scale that the network is told: there is no other guidance."""
        return {"guidance_scale": self.guidance}

    def call(self, resolution: int) -> dict[str, Any]:
        return super().call(resolution) | {"max_sequence_length": self.tokens}


class Wan(Family):
    """A UMT5's states; pictures are videos of one frame."""

    takes_times = False
    tokens = 512  # the default of the pipeline's call; its encode_prompt has another

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        config = pipeline.config
        if pipeline.transformer_2 is not None or config.boundary_ratio is not None or config.expand_timesteps:
            raise UserError(
                "teacher.path: a WanPipeline with two networks or a time for every token (Wan 2.2) has no adapter; "
                "give one of Wan 2.1"
            )
        self.patch = self.network.config.patch_size[1]

    def resolution(self) -> int:
        return 480  # WanPipeline's default height

    def encode(self, captions: list[str], device: torch.device) -> Texts:
        embeds, _ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self.tokens, device=device
        )
        return {"encoder_hidden_states": embeds}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.tokens, self.network.config.text_dim)}

    def widths(self) -> dict[str, tuple[Any, int]]:
        return {"text_dim": (self.network.config.text_dim, self.pipeline.text_encoder.config.d_model)}

    def units(self) -> Units:
        config = self.pipeline.vae.config
        return tuple(config.latents_mean), tuple(1 / s for s in config.latents_std)

    def unpacked(self, latents: Tensor, resolution: int) -> Tensor:
        return latents.squeeze(2)

    def call(self, resolution: int) -> dict[str, Any]:
        return {"height": resolution, "width": resolution, "num_frames": 1}
