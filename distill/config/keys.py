"""The keys of a class of settings: name, type, default and meaning, for help and reference.

Type, range and default are those of the fields. The meaning stands in the class's docstring, in rows of two columns
with two spaces or more between them. A row that starts further right goes on with the meaning above it. Several keys of
one meaning share a row. Rows below a line `name:` form the group `name`:

    optimiser:
    learning_rate             step size at its highest
    adam_beta1, adam_beta2    decay of Adam's two averages
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ..settings import COUNTS, plain
from .validation import options_of, settings_in

ROW = re.compile(r"(\w+(?:, \w+)*)(?: {2,}(\S.*))?")
GROUP = re.compile(r"([a-z]+):")
PLAIN = {bool: "true or false", int: "int", float: "float", str: "text", dict: "section", Any: "section"}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key as people read it.

    name     dotted, as a flag has it
    type     with the range of numbers: "int 1..1000", "float > 0 or null", "one of a, b", "section"
    default  as YAML writes it; "required" where there is none, "" of a section with defaults of its own
    meaning  one line
    group    of the keys that belong together, "" where the class names none
    """

    name: str
    type: str
    default: str
    meaning: str
    group: str = ""


def keys_of(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a class of settings in order, a section's own below it; prefix: put before their names.

    Where a `name` chooses among classes, a section lists the keys of each.
    """
    meanings = meanings_of(cls)
    found: list[Key] = []
    for name, field in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        meaning, group = meanings.get(name, ("", ""))
        sections = settings_in(field.annotation)
        found.append(
            Key(
                prefix + name,
                _type(field.annotation, field.metadata),
                _default(field, sections),
                meaning,
                group,
            )
        )
        for section in sections:
            inner = keys_of(section, f"{prefix}{name}.")
            if len(sections) > 1:
                choice = section.name
                inner = [dataclasses.replace(k, meaning=f"{choice}: {k.meaning}") for k in inner[1:]]
            found += [dataclasses.replace(key, group=group) for key in inner]
    return found


def meanings_of(cls: type) -> dict[str, tuple[str, str]]:
    """Meaning and group of the keys that the docstrings of a class and of its bases describe."""
    found: dict[str, tuple[str, str]] = {}
    for owner in (c for c in reversed(cls.__mro__) if "__pydantic_fields__" in vars(c)):
        for names, meaning, group in _rows(inspect.cleandoc(vars(owner).get("__doc__") or "")):
            found |= dict.fromkeys(names, (meaning, group))
    return found


def _rows(text: str) -> Iterator[tuple[list[str], str, str]]:
    """The rows of a docstring: keys, meaning, group."""
    group, meaning = "", ""
    names: list[str] = []
    for line in [*text.splitlines(), ""]:
        row, heading = ROW.fullmatch(line), GROUP.fullmatch(line)
        if names and line.startswith("  "):
            meaning += f" {line.strip()}"
            continue
        if names:
            yield names, meaning, group
            names = []
        if heading:
            group = heading[1]
        elif row and row[2]:
            names, meaning = row[1].split(", "), row[2]


def _type(kind: Any, limits: list[Any]) -> str:
    kinds = [k for k in options_of(kind) if k is not NoneType]
    choices = [plain(c) for k in kinds if get_origin(k) is Literal for c in get_args(k)]
    texts = [f"one of {', '.join(choices)}"] if choices else []
    texts += [f"{_one(k)}{_range(limits, k)}" for k in kinds if get_origin(k) is not Literal]
    texts = list(dict.fromkeys(texts))
    if len(kinds) > 1 and all(dataclasses.is_dataclass(k) for k in kinds):
        texts = [f"section with a name: {', '.join(k.name for k in kinds)}"]
    return " or ".join(texts + ["null"] * (NoneType in options_of(kind)))


def _one(kind: Any) -> str:
    inside = get_args(kind)
    if get_origin(kind) is tuple:
        if inside[-1] is ...:
            return f"list of {_one(inside[0])}"
        return f"[{', '.join(map(_one, inside))}]"
    return "section" if dataclasses.is_dataclass(kind) else PLAIN[get_origin(kind) or kind]


def _range(limits: list[Any], kind: Any) -> str:
    """Of numbers; bounds that only keep a number writable are left out."""
    if kind not in (int, float):
        return ""
    bounds = {name: getattr(m, name) for m in limits for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    bounds = {name: value for name, value in bounds.items() if value < COUNTS}
    if bounds.keys() == {"ge", "le"}:
        return f" {plain(bounds['ge'])}..{plain(bounds['le'])}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return (
        f" {', '.join(f'{signs[name]} {plain(value)}' for name, value in bounds.items())}" if bounds else ""
    )


def _default(field: Any, sections: list[Any]) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if sections and value is not None else plain(value)
