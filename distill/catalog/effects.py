"""Keys that a configuration gives and that would change nothing: each is refused, with what it needs.

A row says when keys are idle. Those of a run's own keys stand here, those of a method in `MethodSettings.idle`, and the
keys of a run that a method leaves unread in `MethodSettings.ignores`. A key with its default value is never refused: a
resolved configuration writes every key out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.names import CLASSED, STYLES
from ..errors import UserError
from ..settings import Idle
from ..teachers import EMBEDDED

TEACHER_DATA = "teacher"
SQUARE_DATA = (*STYLES, *CLASSED)

RUN = (
    Idle("student.rank student.lora_alpha student.lora_dropout student.target_modules student.export_fused",
         beside="student.kind", only=("lora",)),
    Idle("student.conversion_steps", beside="student.prediction", values=(None,)),
    Idle("student.conversion_steps", beside="max_train_steps", longer=True),
    Idle("ema_decay ema_std", beside="use_ema", only=(True,)),
    Idle("ema_decay", beside="ema_std", only=(None,)),
    Idle("lr_warmup_steps", beside="lr_scheduler", values=("constant",)),
    Idle("lr_warmup_steps", beside="max_train_steps", longer=True),
    Idle("raw_weights.keep", beside="raw_weights.every", values=(0,)),
    Idle("teacher.lora_scale", beside="teacher.lora", values=(None,)),
    Idle("data.split data.image_column data.caption_column data.center_crop", beside="data.name",
         values=(TEACHER_DATA,)),
    Idle("data.center_crop", beside="data.name", values=SQUARE_DATA),
)  # fmt: skip
SEARCH = (
    Idle("fitness.text fitness.log_text fitness.quality fitness.weight fitness.neighbours",
         beside="fitness.kind", only=("jaq",)),
    Idle("fitness.neighbours", beside="fitness.quality", only=("realism",)),
    Idle("fitness.extractor", beside="fitness.quality", only=("realism",), where=("fitness.kind", "jaq")),
)  # fmt: skip
REVISIONS = ("teacher", "vae")  # of a hub id


def check_effects(config: Any, rows: Iterable[Idle], ignores: Iterable[str], method: str) -> None:
    """UserError for the first key of `config` that differs from its default and has no effect.

    config: settings in settings, `method` the method's own. ignores: keys and sections that `method` leaves unread.
    """
    for key in ignores:
        for given in changed(config, key):
            raise UserError(f"{given}: has no effect on method {method}; leave it out")
    for section in REVISIONS:
        place = getattr(config, section, None)
        if place is not None and place.revision is not None and is_local(place.path):
            raise UserError(
                f"{section}.revision: {place.revision} has no effect on {place.path}, which is on this machine; leave "
                "it out"
            )
    for row in rows:
        for key in row.keys.split():
            if not is_default(config, key) and row.holds(
                value_of(config, key), lambda k: value_of(config, k)
            ):
                raise UserError(row.refusal(key, value_of(config, key), value_of(config, row.beside),
                                            default_of(config, key)))  # fmt: skip


def is_local(path: str) -> bool:

    return path in EMBEDDED or Path(path).expanduser().exists()


def changed(config: Any, key: str) -> list[str]:
    """`key`, or the keys of the section `key`, that differ from their defaults."""
    value = value_of(config, key)
    fields = getattr(type(value), "__pydantic_fields__", None)
    if (
        fields is None or default_of(config, key) is None
    ):  # a section that is null by default is itself the key
        return [] if is_default(config, key) else [key]
    return [f"{key}.{name}" for name in fields if not is_default(config, f"{key}.{name}")]


def is_default(config: Any, key: str) -> bool:
    """Whether a key has its default; also where its section is null."""
    owner, _, name = key.rpartition(".")
    place = value_of(config, owner)
    return place is None or getattr(place, name) == default_of(config, key)


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key, None below a section that is null."""
    for part in key.split(".") if key else ():
        config = None if config is None else getattr(config, part)
    return config


def default_of(config: Any, key: str) -> Any:
    owner, _, name = key.rpartition(".")
    field = type(value_of(config, owner)).__pydantic_fields__[name]
    return None if field.is_required() else field.get_default(call_default_factory=True)
