"""Tiny folders of SDXL, SD3, Flux and Wan pipelines: stock classes, random weights, tokenizers of a few words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

SIDE = 16  # pixels; latents are 8 x 8, those of Wan 4 x 4
WORDS = ("red", "cat", "dog", "go", "a", "face")


def clip(tokenizer: Any, cls: Any = CLIPTextModel, **config: Any) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )


def t5(cls: Any = T5EncoderModel, config: Any = T5Config) -> tuple[Any, T5TokenizerFast]:
    """A T5 encoder of width 32 and a Unigram tokenizer of a few words and all letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in WORDS), *letters]
    tokenizer = T5TokenizerFast(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 2, "num_layers": 2}
    return cls(config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **size)), tokenizer


def vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **config,
    )


def sdxl(tokenizer: Any) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    second = {"hidden_size": 24, "projection_dim": 20}
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(tokenizer, hidden_size=16),
        text_encoder_2=clip(tokenizer, CLIPTextModelWithProjection, **second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )


def sd3_network(**config: Any) -> SD3Transformer2DModel:
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        patch_size=2,
        joint_attention_dim=32,
        pooled_projection_dim=16 + 20,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        **{**sizes, **config},
    )


def sd3(tokenizer: Any) -> StableDiffusion3Pipeline:
    encoder, t5_tokenizer = t5()
    projected = CLIPTextModelWithProjection
    return StableDiffusion3Pipeline(
        transformer=sd3_network(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(tokenizer, projected, hidden_size=12, projection_dim=16),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projected, hidden_size=16, projection_dim=20),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer,
    )


def flux_network(**config: Any) -> FluxTransformer2DModel:
    sizes: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    return FluxTransformer2DModel(
        in_channels=16,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **{**sizes, **config},
    )


def flux(tokenizer: Any) -> FluxPipeline:
    encoder, t5_tokenizer = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(tokenizer, hidden_size=16),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=t5_tokenizer,
        transformer=flux_network(),
    )


def wan_network(**config: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
        **config,
    )


def wan(tokenizer: Any) -> WanPipeline:
    encoder, umt5_tokenizer = t5(UMT5EncoderModel, UMT5Config)
    channels = {"latents_mean": (-0.5, 0.1, 0.3, 0.9), "latents_std": (2.0, 1.5, 0.7, 1.1)}
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_spatial=4,
        **channels,
    )
    return WanPipeline(
        tokenizer=umt5_tokenizer,
        text_encoder=encoder,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_network(),
    )


BUILDERS: dict[str, Callable[[Any], Any]] = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan}


@torch.no_grad()
def saved(name: str, tokenizer: Any, folder: Path) -> Path:
    """The pipeline's folder; layers that start at zero are drawn too, so that everything has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = BUILDERS[name](tokenizer)
        for module in pipeline.components.values():
            for p in module.parameters() if isinstance(module, torch.nn.Module) else ():
                if not p.any():
                    p.copy_(0.1 * torch.randn(p.shape))
    pipeline.save_pretrained(folder)
    return folder
