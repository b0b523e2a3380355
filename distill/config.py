"""The run configuration: one YAML file, dotted overrides, typed by pydantic, with errors that name the key."""

import dataclasses
import difflib
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from .errors import UserError
from .settings import AutoencoderSettings, StudentSettings, TeacherSettings, settings

Precision = Annotated[
    Literal["no", "fp16", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads a bare no as false
]


@settings
class DataSettings:
    """name: "emoji", "emoji-noto", "emoji-twemoji", "fashion-mnist", "cifar10", an image folder, webdataset shards, or
    a hub data set. caption_column: null for pictures without captions. random_flip: mirror every second image, for
    methods that train on pixels.

    "teacher": the teacher makes the data's latents from `prompts`, a text file of one prompt a line or a folder of
    such files, and the other keys apply: num_inference_steps (50) of its own sampler, guidance_scale (its own),
    images_per_prompt (1), and the seed of the noise (0).
    """

    name: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = "text"
    center_crop: bool = True
    random_flip: bool = False
    prompts: str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    images_per_prompt: int | None = Field(None, ge=1)
    seed: int | None = None


@settings
class RawWeightsSettings:
    """every: steps between saves of the student's raw weights, 0 for none; keep: how many stay."""

    every: int = Field(0, ge=0)
    keep: int = Field(20, ge=1)


@settings
class RunConfig:
    """Keys are the flag names of diffusers' training scripts; train_batch_size is per device.

    vae: the autoencoder of a method that works in latents without a teacher. ema_std: of EDM2's power function average,
    in place of ema_decay. resume_from_checkpoint: latest, checkpoint-<step>, or the path of another run's checkpoint,
    where a new run folder begins (with its step as max_train_steps it is only exported). compile: the networks, by
    torch.compile. cpu_offload: text encoders and autoencoder wait in the CPU's memory. optimizer adamw_8bit: torchao's,
    or bitsandbytes' without torchao.
    """

    output_dir: str
    method: Any
    data: DataSettings
    teacher: TeacherSettings | None = None
    vae: AutoencoderSettings | None = None
    student: StudentSettings = Field(default_factory=StudentSettings)
    resolution: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_train_steps: int = Field(1000, ge=1)
    optimizer: Literal["adamw", "adamw_8bit", "radam"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu_offload: bool = False
    allow_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    use_ema: bool = False
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    ema_std: float | None = Field(None, gt=0, lt=0.28)
    checkpointing_steps: int = Field(500, ge=1)
    checkpoints_total_limit: int | None = Field(2, ge=1)
    resume_from_checkpoint: str | None = "latest"
    raw_weights: RawWeightsSettings = Field(default_factory=RawWeightsSettings)
    logging_steps: int = Field(10, ge=1)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    validation_steps: int = Field(0, ge=0)
    validation_prompts: tuple[str, ...] = ()


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration {path}; the ready ones are in configs/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no `key: value` lines; see configs/ for examples")
    return tree


def with_overrides(tree: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`--key.sub value` (or `--key.sub=value`) set in a copy of the tree; values are read as YAML."""
    tree = yaml.safe_load(yaml.safe_dump(tree))
    items = list(arguments)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise UserError(f"unexpected argument {item!r}; overrides are written --key.sub value")
        name, equals, value = item[2:].partition("=")
        if not equals:
            bare = not items or items[0].startswith("--")
            value = "true" if bare else items.pop(0)
        if not name:
            raise UserError(f"unexpected argument {item!r}; overrides are written --key.sub value")
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--{name}: {parent} is a single value, it has no key {last}")
        try:
            node[last] = parse_value(value)
        except yaml.YAMLError:
            raise UserError(f"--{name}: {value!r} is not readable YAML; write text as '\"...\"'") from None
    return tree


def parse_value(text: str) -> Any:
    """A YAML value, 1e-4 and 1e3 included."""
    return numbers(yaml.safe_load(text))


def validate(cls: type, tree: Any, prefix: str = "") -> Any:
    """`cls` from a tree, or a UserError that names the first wrong key, its value and the remedy.

    Strict, so that a flag without its value (true) is no 1; by way of JSON, so that a list is a tuple.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(numbers(tree), default=str), strict=True)
    except ValidationError as error:
        raise UserError(_first_line(error, cls, prefix)) from None


def load_config(tree: dict[str, Any]) -> RunConfig:
    """The resolved configuration; `method` becomes the settings of the method that method.name names."""
    return resolved(RunConfig, tree)


def resolved(cls: Any, tree: dict[str, Any]) -> Any:
    """The configuration of class `cls`, `method` with the settings of the one that it names."""
    from .catalog import settings_of

    config = validate(cls, tree)
    method = config.method
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise UserError(f"method: {method!r} has no name; write `method: {{name: lcd}}`")
    rest = {k: v for k, v in method.items() if k != "name"}
    chosen = validate(settings_of(method["name"]), rest, "method.")
    return dataclasses.replace(config, method={"name": method["name"], **dataclasses.asdict(chosen)})


def as_tree(config: Any) -> dict[str, Any]:
    """Plain lists, dicts and numbers, every default written out."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration that was written before keys were added, with those keys; itself where it no longer fits."""
    from .search.config import is_search, load_search

    try:
        return as_tree(load_search(tree) if is_search(tree) else load_config(tree))
    except UserError:
        return tree


def numbers(tree: Any) -> Any:
    """YAML 1.1 reads 1e-4 and 1e3 as text; make them the numbers that were meant."""
    if isinstance(tree, dict):
        return {k: numbers(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [numbers(v) for v in tree]
    if isinstance(tree, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", tree):
        value = float(tree)
        return int(value) if value.is_integer() else value
    return tree


def _first_line(error: ValidationError, cls: type, prefix: str) -> str:
    first = min(error.errors(), key=lambda e: e["type"] == "missing")
    *outer, last = first["loc"]
    owners, location = [cls], []
    for part in (p for p in outer if not isinstance(p, str) or p.isidentifier()):
        tagged = [o for o in owners if len(owners) > 1 and getattr(o, "name", None) == part]
        owners = tagged or _field_classes(owners[0], str(part))
        location += [] if tagged else [part]
    key = prefix + ".".join(str(p) for p in [*location, last])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in dataclasses.fields(owners[0])]
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.0)
        return f"{key}: no such key; the nearest is {near[0]}" if near else f"{key}: no such key"
    if first["type"] == "missing":
        return f"{key}: missing; add it to the configuration"
    given = textwrap.shorten(repr(first["input"]), 60)
    if first["type"] == "dataclass_type":
        name = dataclasses.fields(_field_classes(cls, key)[0])[0].name
        return f"{key}: {given} has no keys; write `{key}: {{{name}: ...}}`"
    return f"{key}: {given} does not fit: {first['msg'].lower()}"


def _field_classes(owner: Any, name: str) -> list[Any]:
    """The classes of settings that a field may hold, several for one that a `name` inside it chooses."""
    kinds = {f.name: f.type for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    return _settings_in(kinds.get(name)) or [None]


def _settings_in(kind: Any) -> list[Any]:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [found for option in get_args(kind) for found in _settings_in(option)]
