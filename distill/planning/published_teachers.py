"""Published configurations of well-known teachers, as diffusers' classes take them: no weights, no tokenizers.

Read in public sources: SD 1.5, FLUX's transformer and autoencoder, SD 3.5 medium's transformer, Wan's transformer,
UMT5's sizes. Recalled, and checked by their parameter counts alone: SDXL, SD3 medium, SD3's autoencoder and schedulers,
and that the files of SD3 and FLUX are in half precision.
"""

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """kind: the pipeline class; parts: the configuration of each component, its library and class under "_class";
    options: the pipeline's own settings; item: bytes of a weight in the files that come without a variant."""

    kind: str
    parts: dict[str, Config]
    options: Config = field(default_factory=dict)
    item: int = 4


def autoencoder(**config: Any) -> Config:
    """AutoencoderKL of Stable Diffusion and its successors: f = 8."""
    return {
        "_class": ("diffusers", "AutoencoderKL"),
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        **config,
    }


def clip(kind: str, width: int, depth: int, heads: int, act: str) -> Config:
    """CLIP's text transformer, projected to its own width."""
    return {
        "_class": ("transformers", kind),
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "hidden_act": act,
    }


def t5_xxl(kind: str, vocab_size: int) -> Config:
    return {
        "_class": ("transformers", kind),
        "vocab_size": vocab_size,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }


CLIP_L = clip("CLIPTextModel", 768, 12, 12, "quick_gelu")
CLIP_L_PROJECTED = clip("CLIPTextModelWithProjection", 768, 12, 12, "quick_gelu")
CLIP_BIG_G = clip("CLIPTextModelWithProjection", 1280, 32, 20, "gelu")
T5_XXL = t5_xxl("T5EncoderModel", 32128)
SD_BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}

# Parameters: U-Net 859,520,964, autoencoder 83,653,863, text encoder 123,060,480.
SD15 = Architecture(
    "StableDiffusionPipeline",
    {
        "unet": {
            "_class": ("diffusers", "UNet2DConditionModel"),
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "vae": autoencoder(sample_size=512, latent_channels=4, scaling_factor=0.18215),
        "text_encoder": CLIP_L,
        "scheduler": {
            "_class": ("diffusers", "PNDMScheduler"),
            **SD_BETAS,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
        },
    },
)

# SimianLuo's latent consistency model of Dreamshaper v7: SD 1.5 with an embedding of the guidance scale.
LCM_DREAMSHAPER = Architecture(
    "LatentConsistencyModelPipeline",
    {
        **SD15.parts,
        "unet": {**SD15.parts["unet"], "time_cond_proj_dim": 256},
        "scheduler": {"_class": ("diffusers", "LCMScheduler"), **SD_BETAS, "set_alpha_to_one": True},
    },
)

# U-Net 2,567,463,684 (arXiv 2307.01952: 2.6 B).
SDXL = Architecture(
    "StableDiffusionXLPipeline",
    {
        "unet": {
            "_class": ("diffusers", "UNet2DConditionModel"),
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": autoencoder(sample_size=1024, latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_BIG_G,
        "scheduler": {
            "_class": ("diffusers", "EulerDiscreteScheduler"),
            **SD_BETAS,
            "timestep_spacing": "leading",
        },
    },
)


def sd3(**config: Any) -> Architecture:
    """Stable Diffusion 3 of 24 layers (arXiv 2403.03206)."""
    return Architecture("StableDiffusion3Pipeline", {
        "transformer": {
            "_class": ("diffusers", "SD3Transformer2DModel"),
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            **config,
        },
        "vae": autoencoder(
            sample_size=1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        "text_encoder": CLIP_L_PROJECTED,
        "text_encoder_2": CLIP_BIG_G,
        "text_encoder_3": T5_XXL,
        "scheduler": {"_class": ("diffusers", "FlowMatchEulerDiscreteScheduler"), "shift": 3.0},
    }, item=2)  # fmt: skip


def flux(guidance: bool, **scheduler: Any) -> Architecture:
    """FLUX.1: 11,901,408,320 parameters in the transformer with an embedding of the guidance scale, 11,891,178,560
    without."""
    return Architecture("FluxPipeline", {
        "transformer": {
            "_class": ("diffusers", "FluxTransformer2DModel"),
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": guidance,
        },
        "vae": autoencoder(
            sample_size=1024, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
        "scheduler": {"_class": ("diffusers", "FlowMatchEulerDiscreteScheduler"), **scheduler},
    }, item=2)  # fmt: skip


# The transformer of 1,418,996,800 parameters is called 1.3 B; the autoencoder is diffusers' default.
WAN_1_3B = Architecture(
    "WanPipeline",
    {
        "transformer": {
            "_class": ("diffusers", "WanTransformer3DModel"),
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        "vae": {"_class": ("diffusers", "AutoencoderKLWan"), "base_dim": 96, "z_dim": 16},
        "text_encoder": t5_xxl("UMT5EncoderModel", 256384),
        "scheduler": {
            "_class": ("diffusers", "UniPCMultistepScheduler"),
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    },
)

KNOWN_TEACHERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "SimianLuo/LCM_Dreamshaper_v7": LCM_DREAMSHAPER,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3(pos_embed_max_size=192),
    "stabilityai/stable-diffusion-3.5-medium": sd3(
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "black-forest-labs/FLUX.1-dev": flux(True, shift=3.0, use_dynamic_shifting=True),
    "black-forest-labs/FLUX.1-schnell": flux(False, shift=1.0),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WAN_1_3B,
}
