"""LoRA files of others: found, added to a pipeline's weights, and refused where a part of them has no place there."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn

from ..errors import UserError

PART = re.compile(  # what follows a layer's name in the key layouts of peft, diffusers and kohya
    r"[._](lora_[AB]|lora_(down|up|mid)|lora\.(down|up)|lora_linear_layer\.(down|up)|lora_magnitude_vector|alpha)"
    r"(\.\w+)*$"
)
OLD_NAMES = (
    (r"\.text_model\.", "."),
    (r"\.processor\.", "."),
    (r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj"),
    (r"\.to_out$", ".to_out.0"),
)


def lora_place(lora: str, key: str) -> tuple[str, str]:
    """The folder or hub id of a LoRA, and its file in it. Raises UserError where neither can be meant."""
    file, (owner, _, rest) = Path(lora).expanduser(), lora.partition("/")
    if file.is_file():
        return str(file.parent), file.name
    name, _, inside = rest.partition("/")
    if file.is_absolute() or owner.startswith((".", "~")) or not inside:
        raise UserError(f"{key}: no file {lora}; give a .safetensors file, or owner/name/file of the hub")
    return f"{owner}/{name}", inside


def fuse_lora(pipeline: Any, lora: str, scale: float = 1.0, *, key: str) -> None:
    """Adds `scale` times a LoRA to the weights that it is of. Raises UserError where it does not fit, or in part."""
    place, name = lora_place(lora, key)
    try:
        file = Path(place) / name if Path(place).is_dir() else Path(hf_hub_download(place, name))
        refuse_magnitudes(file, lora, key)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        if not pipeline.get_active_adapters():
            raise ValueError("no key of it belongs to this pipeline")
        refuse_parts(pipeline, file, lora, key)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    except UserError:
        raise
    except Exception as error:  # of diffusers, peft, safetensors, the hub or the network
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{key}: {lora} cannot be added ({reason}); give a LoRA of this network") from error


def refuse_magnitudes(file: Path, lora: str, key: str) -> None:
    """UserError for kohya's DoRA, whose magnitudes diffusers leaves out; peft's are used."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    else:
        names = list(torch.load(file, map_location="cpu", weights_only=True))
    left = [name for name in names if "dora_scale" in name]
    if left:
        raise UserError(
            f"{key}: {lora} is a DoRA: diffusers would leave out the magnitudes of {len(left)} layers (first: "
            f"{left[0]}); merge it into its model and save that, or give a plain LoRA"
        )


def refuse_parts(pipeline: Any, file: Path, lora: str, key: str) -> None:
    """UserError where layers of the file found none in the pipeline that it was loaded into."""
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    read = pipeline.lora_state_dict(str(file.parent), weight_name=file.name, **options)
    layers = layers_of(read[0] if isinstance(read, tuple) else read)
    found = dict.fromkeys(adapted_layers(pipeline))
    if len(layers) <= len(found):
        return
    left = [name for name in layers if name not in found] or layers
    network = type(getattr(pipeline, "unet", None) or pipeline.transformer).__name__
    raise UserError(
        f"{key}: {len(layers) - len(found)} of {len(layers)} layers of {lora} fit no layer of {network} or of the text "
        f"encoders (first: {left[0]}); give a LoRA of this network"
    )


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers that a file's keys are of, in its order."""
    return list(dict.fromkeys(plain(PART.sub("", name)) for name in names if not name.endswith(".alpha")))


def plain(layer: str) -> str:
    """A layer's name in its network, of those that diffusers' older layouts have."""
    for old, new in OLD_NAMES:
        layer = re.sub(old, new, layer)
    return layer


def adapted_layers(pipeline: Any) -> list[str]:
    """The layers that hold an adapter, by component and name."""
    return [
        plain(f"{part}.{name}")
        for part, module in pipeline.components.items()
        if isinstance(module, nn.Module)
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
