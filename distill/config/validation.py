"""Trees of YAML made the typed settings that they mean, or one line that names the first key that does not fit."""

import dataclasses
import json
import math
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from ..readers import Written, WrittenFloat, WrittenInt
from .nearest import hint

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
LARGEST = 2**63


def validate(cls: type, tree: Any, prefix: str = "") -> Any:
    """`cls` from a tree, or a UserError that names the first wrong key, its value and the remedy.

    Strict, so that a flag without its value (true) is no 1; by way of JSON, so that a list is a tuple.
    """
    meant = _as_meant(tree, cls, prefix.removesuffix("."))
    try:
        return TypeAdapter(cls).validate_json(json.dumps(meant, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_first_line(error, cls, prefix)) from None


def numbers(tree: Any) -> Any:
    """YAML 1.1 reads 1e-4 and 1e3 as text; make them the numbers that were meant."""
    if isinstance(tree, dict):
        return {k: numbers(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [numbers(v) for v in tree]
    if isinstance(tree, str) and NUMBER.fullmatch(tree):
        value = float(tree)
        kept = WrittenInt(value) if value.is_integer() else WrittenFloat(value)
        kept.text = tree
        return kept
    return tree


def _as_meant(tree: Any, kind: Any, key: str) -> Any:
    """A tree for the type `kind`: text where text is meant, numbers elsewhere. Refuses what no number holds."""
    kinds = options_of(kind)
    if isinstance(tree, dict):
        owners = [k for k in kinds if dataclasses.is_dataclass(k)]
        fields = {f.name: f.type for owner in owners for f in dataclasses.fields(owner)}
        rest = next((get_args(k)[-1] for k in kinds if get_origin(k) is dict), Any)
        return {
            k: _as_meant(v, fields.get(k, rest), f"{key}.{k}" if key else str(k)) for k, v in tree.items()
        }
    if isinstance(tree, list):
        item = next((get_args(k)[0] for k in kinds if get_origin(k) is tuple), Any)
        return [_as_meant(v, item, f"{key}.{i}") for i, v in enumerate(tree)]
    if str in kinds:
        return tree.text if isinstance(tree, Written) else tree
    value = numbers(tree)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: {shown(value)} is not finite; give a number that is")
    if isinstance(value, int) and int in kinds and not -LARGEST <= value < LARGEST:
        raise UserError(f"{key}: {shown(value)} is too large; give a number below 9e18")
    return value


def shown(value: Any) -> str:
    """A value for a message, at most 60 characters of one line."""
    text = " ".join((value.text if isinstance(value, Written) else repr(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."


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
        return f"{key}: no such key; {hint(str(last), [f.name for f in dataclasses.fields(owners[0])])}"
    if first["type"] == "missing":
        return f"{key}: missing; add it to the configuration"
    given = shown(first["input"])
    if first["type"] == "union_tag_not_found":
        return f"{key}: {given} has no name; write `{key}: {{name: ...}}`"
    if first["type"] == "union_tag_invalid":
        names = first["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{key}.name: there is no {first['ctx']['tag']!r}; {hint(first['ctx']['tag'], names)}"
    if first["type"] == "dataclass_type":
        name = dataclasses.fields(_field_classes(cls, key.removeprefix(prefix))[0])[0].name
        return f"{key}: {given} has no keys; write `{key}: {{{name}: ...}}`"
    quotes = (
        "; write text in quotes"
        if isinstance(first["input"], bool) and first["type"] == "string_type"
        else ""
    )
    return f"{key}: {given} does not fit: {first['msg'].lower()}{quotes}"


def _field_classes(owner: Any, name: str) -> list[Any]:
    """The classes of settings that a field may hold, several for one that a `name` inside it chooses."""
    kinds = {f.name: f.type for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    return settings_in(kinds.get(name)) or [None]


def settings_in(kind: Any) -> list[Any]:
    """The classes of settings in a type, also as values of a dict."""
    inside = [get_args(k)[-1] if get_origin(k) is dict else k for k in options_of(kind)]
    return [k for k in inside if dataclasses.is_dataclass(k)]


def options_of(kind: Any) -> list[Any]:
    """The types that a type may be: those of unions and annotations."""
    if get_origin(kind) is Annotated:
        return options_of(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for part in get_args(kind) for option in options_of(part)]
    return [kind]
