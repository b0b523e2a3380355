"""The run configuration: one YAML file, dotted overrides, typed by pydantic, with errors that name the key."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter

from ..catalog.effects import RUN, check_effects
from ..errors import UserError
from ..readers import Unreadable, parse_yaml, read_yaml_file
from ..settings import COUNTS, SEEDS, AutoencoderSettings, Idle, StudentSettings, TeacherSettings, settings
from .validation import numbers, options_of, settings_in, shown, validate

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
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    images_per_prompt: int | None = Field(None, ge=1, le=COUNTS)
    seed: int | None = Field(None, ge=0, lt=SEEDS)


@settings
class RawWeightsSettings:
    """every: steps between saves of the student's raw weights, 0 for none; keep: how many stay."""

    every: int = Field(0, ge=0, le=COUNTS)
    keep: int = Field(20, ge=1, le=COUNTS)


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
    resolution: int | None = Field(None, ge=1, le=16384)
    seed: int = Field(0, ge=0, lt=SEEDS)
    train_batch_size: int = Field(16, ge=1, le=65536)
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536)
    max_train_steps: int = Field(1000, ge=1, le=COUNTS)
    optimizer: Literal["adamw", "adamw_8bit", "radam"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0, le=100)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0, le=COUNTS)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0, le=1000)
    adam_epsilon: float = Field(1e-8, ge=0, le=1)
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
    checkpointing_steps: int = Field(500, ge=1, le=COUNTS)
    checkpoints_total_limit: int | None = Field(2, ge=1, le=COUNTS)
    resume_from_checkpoint: str | None = "latest"
    raw_weights: RawWeightsSettings = Field(default_factory=RawWeightsSettings)
    logging_steps: int = Field(10, ge=1, le=COUNTS)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    validation_steps: int = Field(0, ge=0, le=COUNTS)
    validation_prompts: tuple[str, ...] = ()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a configuration file; numbers keep their text, for keys that want text."""
    try:
        tree = read_yaml_file(path, written=True)
    except FileNotFoundError:
        raise UserError(f"no configuration {path}; the ready ones are in configs/") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no `key: value` lines; see configs/ for examples")
    return tree


def with_overrides(tree: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`--key.sub value` (or `--key.sub=value`) set in a copy of the tree; of a flag given twice the last counts.

    Values are read as YAML, those of keys that want text (`takes_text`) as they are written.
    """
    tree = copy.deepcopy(tree)
    items = list(arguments)
    while items:
        item = items.pop(0)
        name, equals, value = item[2:].partition("=")
        if not item.startswith("--") or not name:
            raise UserError(f"unexpected argument {shown(item)}; overrides are written --key.sub value")
        bare = not equals and (not items or items[0].startswith("--"))
        if bare and takes_text(name):
            raise UserError(f"--{name}: its value is missing; write --{name} TEXT")
        if not equals:
            value = "true" if bare else items.pop(0)
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"--{name}: {parent} is a single value, it has no key {last}")
        try:
            node[last] = parse_text(value) if takes_text(name) else parse_value(value, written=True)
        except Unreadable as error:
            raise UserError(f"--{name}: {shown(value)} {error}; write text as '\"...\"'") from None
    return tree


def fitted(tree: dict[str, Any], ready: dict[str, Any]) -> dict[str, Any]:
    """`tree` without those values of `ready` that the caller left alone and whose effect he took away.

    Without `use_ema` there is no ema_decay, with a constant rate no warm-up, without pictures no prompts for them, and
    where a run was cut short what would begin or end after it does so in a twentieth of it. What `ready` itself has in
    vain stays, and is refused.
    """
    out = copy.deepcopy(tree)

    def lost(key: str, idle: Callable[[dict[str, Any]], bool]) -> bool:
        return key in out and out[key] == ready.get(key) and idle(out) and not idle(ready)

    if lost("ema_decay", lambda t: not t.get("use_ema") or t.get("ema_std") is not None):
        del out["ema_decay"]
    if lost("lr_warmup_steps", lambda t: t.get("lr_scheduler", "constant") == "constant"):
        del out["lr_warmup_steps"]
    if lost("validation_prompts", lambda t: not t.get("validation_steps")):
        del out["validation_prompts"]
    for key in _bounded_by_the_run(out):
        owner, here, there = key.split(".")[:-1], _number(out, key), _number(ready, key)
        total, whole = (_number(t, "max_train_steps") or 1000 for t in (out, ready))
        if here is not None and here == there and total < here <= whole:
            _section(out, owner)[key.split(".")[-1]] = total // 20
    return out


def _bounded_by_the_run(tree: dict[str, Any]) -> list[str]:
    """The keys of steps that have no effect beyond max_train_steps."""
    from ..catalog.methods import settings_of

    try:
        rows = (*RUN, *getattr(settings_of(method_name(tree)), "idle", ()))
    except UserError:  # told when the tree is checked
        rows = RUN
    return [key for row in rows if row.longer for key in row.keys.split()]


def _section(tree: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The section of a tree that was not checked yet, {} where there is none."""
    for part in parts:
        tree = tree.get(part, {})
        if not isinstance(tree, dict):
            return {}
    return tree


def _number(tree: dict[str, Any], key: str) -> int | None:
    """The integer at a dotted key of a tree that was not checked yet, None where there is none."""
    *owner, last = key.split(".")
    value = numbers(_section(tree, owner).get(last))
    return value if isinstance(value, int) else None


def parse_value(text: str, *, written: bool = False) -> Any:
    """A YAML value, 1e-4 and 1e3 included. Raises Unreadable, without a name."""
    try:
        return numbers(parse_yaml(text, "", written=written))
    except Unreadable:
        raise Unreadable("is not readable YAML") from None


def parse_text(text: str) -> str | None:
    """Text as it is written, without its quotes if it has any; null for none."""
    if text in ("null", "~", ""):
        return None
    if text[0] in "\"'":
        value = parse_value(text)
        return value if isinstance(value, str) else text
    return text


def takes_text(name: str) -> bool:
    """Whether the key `name` holds text: of a run, a search, a method or a stage of train-teacher's."""
    from ..catalog.methods import METHODS, SEARCHES
    from .search import SearchConfig

    parts = name.split(".")
    if parts[0] == "stages":
        parts = parts[2:]
    if parts == ["method", "name"]:
        return True
    owners: list[Any] = [RunConfig, SearchConfig]
    if parts[:1] == ["method"]:
        methods: list[Any] = [*METHODS.values(), *SEARCHES.values()]
        owners, parts = [m.Settings for m in methods], parts[1:]
    kinds: list[Any] = []
    for part in parts:
        kinds = [f.type for o in owners for f in dataclasses.fields(o) if f.name == part]
        owners = [owner for kind in kinds for owner in settings_in(kind)]
    return any(str in options_of(kind) for kind in kinds)


def load_config(tree: dict[str, Any], prefix: str = "") -> RunConfig:
    """The resolved configuration; `method` becomes the settings of the method that method.name names.

    prefix: put before the keys in what a UserError says. Raises it also for keys that would have no effect.
    """
    from ..catalog.methods import method_named

    name = method_name(tree, prefix)
    try:
        method = method_named(name)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None
    config: RunConfig = resolved(RunConfig, tree, RUN, method.ignores, prefix)
    if config.teacher is None and method.needs_teacher(config.student):
        raise UserError(f"{prefix}teacher: missing; this method needs `teacher: {{path: ...}}`")
    return config


def recorded(tree: dict[str, Any]) -> RunConfig:
    """The configuration that a run folder holds, as `load_config`; what has no effect in it is let be."""
    return resolved(RunConfig, tree, None)


def resolved(
    cls: Any, tree: dict[str, Any], rows: Sequence[Idle] | None, ignores: Sequence[str] = (), prefix: str = ""
) -> Any:
    """The configuration of class `cls`, `method` with the settings of the one that it names; refuses the keys that are
    idle by `rows`, the method's own rows and `ignores`, unless rows is None."""
    from ..catalog.methods import settings_of

    name = method_name(tree, prefix)
    config = validate(cls, tree, prefix)
    kind = settings_of(name)
    chosen = validate(kind, {k: v for k, v in tree["method"].items() if k != "name"}, f"{prefix}method.")
    if rows is not None:
        try:
            whole = dataclasses.replace(config, method=chosen)
            check_effects(whole, (*rows, *getattr(kind, "idle", ())), ignores, name)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None
    return dataclasses.replace(config, method={"name": name, **dataclasses.asdict(chosen)})


def method_name(tree: dict[str, Any], prefix: str = "") -> str:
    """method.name of a tree."""
    if "method" not in tree:
        raise UserError(f"{prefix}method: missing; write `method: {{name: lcd}}`")
    method = tree["method"]
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise UserError(f"{prefix}method: {shown(method)} has no name; write `method: {{name: lcd}}`")
    return str(method["name"])


def as_tree(config: Any) -> dict[str, Any]:
    """Plain lists, dicts and numbers, every default written out."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration that was written before keys were added, with those keys; itself where it no longer fits."""
    from .search import is_search, load_search

    try:
        return as_tree(load_search(tree) if is_search(tree) else recorded(_as_before(tree)))
    except UserError:
        return tree


def _as_before(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree that was written before keys of its method were added, with what runs did then (`Settings.before`)."""
    from ..catalog.methods import settings_of

    before = getattr(settings_of(method_name(tree)), "before", {})
    return {**tree, "method": {**before, **tree["method"]}}
