"""Command lines by argparse whose mistakes are `UserError`s, and the types of their numbers."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from ..errors import UserError

MOST_IMAGES = 1_000_000  # picture i of a seed block has the seed 1,000,000 block + i
MOST_STEPS = 1000


class Parser(argparse.ArgumentParser):
    """Without abbreviations: --seed is a key of a configuration, not --seeds."""

    def __init__(self, *, prog: str, description: str | None = None, epilog: str | None = None):
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


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
