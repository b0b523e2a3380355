"""Command lines by argparse whose mistakes are `UserError`s, and the types of their numbers."""

import argparse
import math
import textwrap
from collections.abc import Callable
from typing import NoReturn

from ..errors import UserError

MOST_IMAGES = 1_000_000  # picture i of a seed block has the seed 1,000,000 block + i
MOST_STEPS = 1000

Verb = Callable[[list[str]], int]  # its docstring: the usage in the first line, then what it does


def usage_of(verb: Verb) -> str:
    return f"fewstep {(verb.__doc__ or '').splitlines()[0]}"


def described(verb: Verb) -> str:
    """What a verb does, in one line."""
    return " ".join("".join((verb.__doc__ or "").partition("\n")[2]).split())


class Parser(argparse.ArgumentParser):
    """The flags of a verb. Without abbreviations: --seed is a key of a configuration, not --seeds."""

    def __init__(self, verb: Verb, *, epilog: str | None = None, usage: str | None = None):
        name = usage_of(verb).split(maxsplit=2)[1]
        super().__init__(
            prog=f"fewstep {name}", usage=usage, description=described(verb), epilog=epilog, allow_abbrev=False,
            formatter_class=_Defaults,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of every flag that has one and does not name it itself. Paths and names stay on one line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a whole number of this range, both ends included."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give {low} to {high}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is outside {low} to {high}; give a number in it")
        return value

    return read


def place(text: str) -> str:
    """The type of a name or a path, which has a character at least."""
    if not text:
        raise argparse.ArgumentTypeError("'' names nothing; give a name or a path")
    return text


def scale(text: str) -> float:
    """The type of a guidance scale."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is outside 0 to 1000; give a number in it")
    return value
