"""Writes what diffusers loads: a pipeline folder with sampling.json and a model card, and a LoRA folder."""

import copy
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
KOHYA = "kohya"  # the folder of a run's `write_kohya`


def is_own(model: Any) -> bool:
    """Whether the class of a pipeline or of a component stands in a file of this folder."""
    return Path(inspect.getfile(type(model))).parent == FOLDER


def own_parts(model: Any) -> dict[str, Any]:
    """The components of a pipeline whose classes stand in this folder, by name."""
    return {k: v for k, v in getattr(model, "components", {}).items() if v is not None and is_own(v)}


@dataclass
class Adapter:
    """weights: a LoRA in peft's keys with its scale multiplied in; scheduler: what the teacher's pipeline needs;
    pipeline: the teacher's class; component: its name of the network, unet or transformer."""

    weights: dict[str, Tensor]
    scheduler: Any
    pipeline: Any = StableDiffusionPipeline
    component: str = "unet"


@dataclass
class Export:
    """model: a pipeline, or a single model with save_pretrained, None where the adapter is all; beside: what is saved
    into the same folder (a tokenizer). sampling: exact call arguments per number of steps, as strings, or under
    "default" for any number. adapter: a LoRA, which gets a folder of its own. checked: a sentence for the card on
    how it agrees with the sampler of training."""

    model: Any
    beside: Sequence[Any] = ()
    sampling: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: Adapter | None = None
    checked: str = ""


def in_float32(components: Mapping[str, Any]) -> dict[str, Any]:
    """The same parts; networks that a run holds in half precision as float32 copies.

    A text encoder opens in the precision it was saved in, and a float32 network beside it would refuse its states.
    """
    return {
        k: copy.deepcopy(v).float() if isinstance(v, nn.Module) and v.dtype != torch.float32 else v
        for k, v in components.items()
    }


def write_export(export: Export, folder: Path, card: str = "") -> None:
    """Save into the empty `folder`; no JSON in it names a path of the machine it was made on.

    A pipeline class of ours takes its one file along, a network class of ours its own into its component's folder, and
    model_index.json names them: diffusers then loads the folder with trust_remote_code=True, without this project.
    """
    export.model.save_pretrained(folder, safe_serialization=True)
    named = {name: copied(part, folder / name) for name, part in own_parts(export.model).items()}
    if is_own(export.model):
        named["_class_name"] = copied(export.model, folder)
    if named:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), **named}, indent=2) + "\n")
    for part in export.beside:
        part.save_pretrained(folder)
    write_notes(export, folder, card)


def write_variant(
    source: Path,
    folder: Path,
    parts: Mapping[str, Any],
    sampling: dict[str, dict[str, Any]],
    card: str = "",
) -> None:
    """Fill the empty `folder` with the pipeline folder `source`, its code too, and other `parts` in place of its own.

    A part whose class is ours takes its file along; the stock pipeline around it then needs trust_remote_code=True.
    """
    gone = {*parts, "README.md", "sampling.json", "samples.png", "config.yaml"}

    def left_out(path: str, names: list[str]) -> set[str]:
        return gone & set(names) if Path(path) == source else set()

    shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
    index = folder / "model_index.json"
    named = json.loads(index.read_text())
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        if is_own(part):
            named[name] = copied(part, folder / name)
        elif (source / name / f"{named[name][0]}.py").is_file():  # the code that comes with the source
            shutil.copy(source / name / f"{named[name][0]}.py", folder / name)
    index.write_text(json.dumps(named, indent=2) + "\n")
    write_notes(Export(None, sampling=sampling), folder, card)


def copied(own: Any, folder: Path) -> list[str]:
    """Puts the file of an object's class into `folder`; module and class, as model_index.json names them."""
    source = Path(inspect.getfile(type(own)))
    shutil.copy(source, folder / source.name)
    return [source.stem, type(own).__name__]


def write_adapter(export: Export, folder: Path, card: str = "") -> None:
    """Save the LoRA into the empty `folder` as pytorch_lora_weights.safetensors, with its scheduler's configuration.

    A scheduler class of ours takes its file along.
    """
    adapter = export.adapter
    assert adapter is not None
    layers = {f"{adapter.component}_lora_layers": adapter.weights}
    adapter.pipeline.save_lora_weights(folder, **layers, safe_serialization=True)
    adapter.scheduler.save_pretrained(folder)
    if is_own(adapter.scheduler):
        copied(adapter.scheduler, folder)
    write_notes(export, folder, card)


def write_kohya(adapter: Adapter, folder: Path, name: str) -> None:
    """Save a U-Net's LoRA as <name>.safetensors into the empty `folder`, in the key layout of kohya and ComfyUI.

    A transformer's needs none: ComfyUI takes diffusers' keys of SD3, Flux and Wan.
    """
    assert adapter.component == "unet"
    keys = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in adapter.weights.items()})
    tensors = {k: v.detach().cpu().contiguous() for k, v in keys.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def write_notes(export: Export, folder: Path, card: str) -> None:
    """sampling.json and the model card; the paths that the other JSON files name are dropped."""
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
