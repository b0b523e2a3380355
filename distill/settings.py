"""Typed sections of a configuration that the nouns read; every method's own settings are built the same way."""

from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

settings = partial(dataclass, frozen=True, config=ConfigDict(extra="forbid"))

Norm = Literal["non_scaling", "non_scaling_last", "layer", "rms", "non_scaling_group", "non_scaling_instance"]

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@settings
class TeacherSettings:
    """path: an embedded teacher's name, a diffusers pipeline folder, or a hub id.

    lora        a .safetensors file, or `owner/name/file.safetensors` of the hub, added to the weights of network and
                text encoders; lora_scale times
    quantisation  w8: the network's linear layers hold integers of 8 bits (torchao), for a LoRA student
    """

    path: str
    variant: str | None = None
    revision: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    quantisation: Literal["w8"] | None = None


@settings
class AutoencoderSettings:
    """path: a folder of AutoencoderKL or a hub id; subfolder: where it stands in a pipeline's folder."""

    path: str
    subfolder: str | None = None
    revision: str | None = None


@settings
class StudentSettings:
    """kind: all weights, or a LoRA on the teacher's network (LCM-LoRA, arXiv 2311.05556: rank 64, alpha 64).
    export_fused: beside lora/ also a pipeline/ with the LoRA added to the weights; a full student has its pipeline.

    init     where a method allows both: the teacher's weights, or new ones
    network  architecture of new weights: a diffusers model's arguments and its `_class_name` (UNet2DModel where there
             is none; TwoTimeDiT is ours); null for the teacher's architecture
    dropout  of the residual blocks while training; null for what the architecture says
    target_modules  of the LoRA; the default is a U-Net's, in place of which a transformer takes its attention's layers
    norm     of new weights, in place of the architecture's: those of pipelines/unet_norms.py, which tie a UNet to its
             resolution
    """

    kind: Literal["full", "lora"] = "full"
    init: Literal["teacher", "scratch"] = "teacher"
    network: dict[str, Any] | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    norm: Norm | None = None
    rank: int = Field(64, ge=1)
    lora_alpha: int = Field(64, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = LORA_TARGETS
    export_fused: bool = True
