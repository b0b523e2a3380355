"""`fewstep recipes`: the ready configurations in a table, or one of them as a file to start from."""

import sys

from ..catalog.recipes import Recipe, find, recipes
from ..errors import UserError
from .arguments import Parser

HEAD = ("recipe", "method", "teacher", "data", "paper")


def recipes_command(arguments: list[str]) -> int:
    """recipes [show NAME > mine.yaml]

    The ready configurations, or the text of one to start from. `fewstep distill NAME` runs one.
    """
    parser = Parser(
        recipes_command, epilog="A search stands with the student that it starts from in place of a teacher."
    )
    parser.add_argument("show", nargs="?", choices=["show"], help="print one")
    parser.add_argument("name", nargs="?", help="of the table")
    args = parser.parse_args(arguments)
    if args.show:
        if args.name is None:
            raise UserError("recipes show: which one? `fewstep recipes` lists them")
        sys.stdout.write(find(args.name).read_text(encoding="utf-8"))
    else:
        print(table(recipes()))
    return 0


def table(rows: list[Recipe]) -> str:
    """A line for each, in columns; of a hub id or a path its last part."""
    cells = [HEAD, *((r.name, r.method, _last(r.teacher), _short(r.data), r.paper or "") for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _last(place: str | None) -> str:
    return "" if place is None else place.rstrip("/").rpartition("/")[2]


def _short(data: str) -> str:
    """Shards go by their folder."""
    folder, _, pattern = data.rpartition("/")
    return folder if pattern.endswith(".tar") else data
