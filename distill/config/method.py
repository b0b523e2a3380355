"""The method of a configuration: its keys, typed, and the class that they are for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from ..errors import UserError
from ..settings import MethodSettings
from .tree import method_name
from .validation import validate


class ChosenMethod(dict[str, Any]):
    """`name` and the method's keys, every default written out, as a configuration file has them.

    settings  the same, typed
    load      gives the class of the method or search: torch is imported there
    """

    def __init__(self, name: str, settings: MethodSettings, load: Callable[[], type[Any]]):
        super().__init__(name=name, **dataclasses.asdict(settings))  # type: ignore[call-overload]
        self.settings, self.load = settings, load


def as_tree(config: Any) -> dict[str, Any]:
    """Plain lists, dicts and numbers, every default written out."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def with_defaults(tree: dict[str, Any], config: Any) -> dict[str, Any]:
    """A configuration of `config`'s kind that was written before keys were added, with those keys and what runs did
    then (`MethodSettings.before`); itself where it no longer fits."""
    chosen: ChosenMethod = config.method
    try:
        if method_name(tree) != chosen["name"]:
            return tree
        whole = validate(type(config), tree)
        keys = {**chosen.settings.before, **{k: v for k, v in tree["method"].items() if k != "name"}}
        settings = validate(type(chosen.settings), keys, "method.")
    except UserError:
        return tree
    return as_tree(dataclasses.replace(whole, method=ChosenMethod(chosen["name"], settings, chosen.load)))
