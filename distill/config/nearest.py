"""What a mistyped name may have meant."""

import textwrap
from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name of `known` that is most like `word`, capitals and `-` for `_` aside; None where none is like it."""
    plain = {_plain(name): name for name in known}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def hint(word: str, known: Iterable[str]) -> str:
    """ "the nearest is lcd", or what there is: "there are lcd, dmd2, ..."."""
    names = list(known)
    near = nearest(word, names)
    return f"the nearest is {near}" if near else f"there are {textwrap.shorten(', '.join(names), 200)}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
