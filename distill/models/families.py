"""What differs between the latent pipelines of diffusers: network, prompts, sizes. One small class each."""

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.guidance import guidance_embedding
from ..diffusion.process import VP, RectifiedFlow
from ..errors import UserError
from .codec import Units, vae_scale_factor
from .network_adapters import denoiser_of

Texts = dict[str, Tensor]
UNET_PREDICTIONS = ("epsilon", "v_prediction", "sample")


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


FAMILIES: dict[type[DiffusionPipeline], type[Family]] = {
    StableDiffusionPipeline: StableDiffusion,
    LatentConsistencyModelPipeline: LatentConsistency,
    StableDiffusionXLPipeline: StableDiffusionXL,
    StableDiffusion3Pipeline: StableDiffusion3,
    FluxPipeline: Flux,
    WanPipeline: Wan,
}
FAMILY_NAMES: tuple[str, ...] = tuple(cls.__name__ for cls in FAMILIES)


def family_of(pipeline: Any) -> Family | None:
    """None for a pipeline class without one."""
    return next((family(pipeline) for cls, family in FAMILIES.items() if isinstance(pipeline, cls)), None)
