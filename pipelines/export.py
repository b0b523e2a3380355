"""Writes what diffusers loads: a pipeline folder with sampling.json and a model card, and a LoRA file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor


@dataclass
class Export:
    """model: a pipeline, or a single model with save_pretrained; beside: what is saved into the same folder (a
    tokenizer). sampling: exact call arguments per number of steps, as strings, or under "default" for any number.
    lora: an adapter in peft's keys, written as pytorch_lora_weights.safetensors."""

    model: Any
    beside: Sequence[Any] = ()
    sampling: dict[str, dict[str, Any]] = field(default_factory=dict)
    lora: dict[str, Tensor] | None = None


def write_export(export: Export, folder: Path, card: str = "") -> None:
    """Save into the empty `folder`; no JSON in it names a path of the machine it was made on."""
    export.model.save_pretrained(folder, safe_serialization=True)
    for part in export.beside:
        part.save_pretrained(folder)
    if export.lora is not None:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=export.lora, safe_serialization=True
        )
    if export.sampling:
        (folder / "sampling.json").write_text(json.dumps(export.sampling, indent=2) + "\n")
    if card:
        (folder / "README.md").write_text(card)
    for path in folder.rglob("*.json"):
        forget_paths(path)


def forget_paths(path: Path) -> None:
    """Drop the entries that name the folder a part was loaded from."""
    tree = json.loads(path.read_text())
    if not isinstance(tree, dict):
        return
    kept = {k: v for k, v in tree.items() if k not in ("_name_or_path", "name_or_path")}
    if kept != tree:
        path.write_text(json.dumps(kept, indent=2) + "\n")


def sampling_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The call arguments that an export carries, {} for foreign folders."""
    path = folder / "sampling.json"
    return json.loads(path.read_text()) if path.is_file() else {}
