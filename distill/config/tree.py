"""Configurations as trees: read from YAML files, and single values as a command line writes them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..readers import Unreadable, parse_yaml, read_yaml_file
from .validation import numbers, shown


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a configuration file; numbers keep their text, for keys that want text."""
    try:
        tree = read_yaml_file(path, written=True)
    except FileNotFoundError:
        raise UserError(f"no configuration {path}; `fewstep recipes` lists the ready ones") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no `key: value` lines; `fewstep recipes show emoji/lcd` is an example")
    return tree


def merged(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with `values` in place of its own; a dict changes the keys of its section alone."""
    out = copy.deepcopy(dict(tree))
    for key, value in values.items():
        section = out.get(key)
        if isinstance(section, dict) and isinstance(value, Mapping):
            out[key] = merged(section, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


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


def method_name(tree: dict[str, Any], prefix: str = "") -> str:
    """method.name of a tree. prefix: put before the keys in what a UserError says."""
    if "method" not in tree:
        raise UserError(f"{prefix}method: missing; write `method: {{name: lcd}}`")
    method = tree["method"]
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise UserError(f"{prefix}method: {shown(method)} has no name; write `method: {{name: lcd}}`")
    return str(method["name"])
