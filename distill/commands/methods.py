"""The verb methods."""

from ..catalog.methods import METHODS, SEARCHES, Entry
from .arguments import Parser

NEEDS = {"always": "teacher", "to_start": "teacher or data", "never": "data"}


def methods(arguments: list[str]) -> int:
    """methods

    List every method and search: what it needs, its paper, and its idea in one line.
    """
    Parser(methods).parse_args(arguments)
    print(table())
    return 0


def table() -> str:
    """The list of methods and searches in columns."""
    rows = [("method", "needs", "paper", "idea")]
    rows += [_row(name, entry, NEEDS[entry.settings.needs_teacher]) for name, entry in METHODS.items()]
    rows += [_row(name, entry, "student") for name, entry in SEARCHES.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "teacher or data: from the teacher's weights, or with `student.init: scratch` from data alone, as the "
            "method's keys say.",
            "`fewstep distill --method.name NAME --help` lists the keys of a method.",
        ]
    )


def _row(name: str, entry: Entry, needs: str) -> tuple[str, str, str, str]:
    origin = entry.settings.origin
    paper = f"{origin.paper.name}, arXiv {origin.paper.arxiv}" if origin else "none"
    return name, needs, paper, entry.settings.idea
