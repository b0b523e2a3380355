"""A CLIP of 32 px and width 32 with random weights: open_clip's classes, and the same weights in transformers'."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

NAME = "fewstep-tiny"
LAYERS, WIDTH = 2, 32
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
}


def register(folder: Path) -> None:
    """Make open_clip know NAME and NAME-quickgelu."""
    for name, extra in ((NAME, {}), (f"{NAME}-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps({**CONFIG, **extra}))
        open_clip.add_model_config(folder / f"{name}.json")


def save_random(path: Path, seed: int = 0) -> Path:
    """A checkpoint whose activations are large enough for QuickGELU and GELU to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(NAME)
        state = {k: v.clone() for k, v in model.state_dict().items()}
    for key, value in state.items():
        if value.ndim == 2 and "embedding" not in key:
            state[key] = value * 3
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def in_transformers(weights: dict[str, Tensor], activation: str) -> Any:
    """transformers' CLIPModel with the weights of an open_clip checkpoint of CONFIG."""
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "hidden_act": activation,
    }
    model = CLIPModel(
        CLIPConfig(
            projection_dim=16,
            vision_config={**shared, "intermediate_size": 4 * WIDTH, "image_size": 32, "patch_size": 8},
            text_config={
                **shared,
                "intermediate_size": 4 * WIDTH,
                "vocab_size": 49408,
                "eos_token_id": 49407,
            },
        )
    )
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    parts = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    parts["ln_final"] = "text_model.final_layer_norm"
    blocks = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    state = {
        "visual_projection.weight": weights["visual.proj"].T,
        "text_projection.weight": weights["text_projection"].T,
    }
    for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(LAYERS):
            old, new = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            parts |= {f"{old}.{a}": f"{new}.{b}" for a, b in blocks.items()}
            parts[f"{old}.attn.out_proj"] = f"{new}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                thirds = weights[f"{old}.attn.in_proj_{kind}"].chunk(3)
                state |= {f"{new}.self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", thirds, strict=True)}
    names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in parts.items() for kind in ("weight", "bias")}
    state |= {theirs: weights[ours] for ours, theirs in names.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in k for k in missing), (missing, unexpected)
    return model.eval()
