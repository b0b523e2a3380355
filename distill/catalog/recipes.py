"""The ready configurations: each found by its name, and what it trains, on what, after which paper."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.nearest import nearest
from ..config.tree import read_yaml
from ..errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")  # an arXiv number


@dataclass(frozen=True)
class Recipe:
    """A ready configuration of `fewstep distill` or `fewstep train-teacher`.

    name     as a command takes it: emoji/lcd
    method   of the training or the search; "train-teacher" for the stages of a teacher
    teacher  name, folder or hub id; of a search the student that it starts from; None: from data alone
    data     name, folder or shards
    paper    the first arXiv number of the comment at the file's head; None where there is no paper
    path     the YAML file
    """

    name: str
    method: str
    teacher: str | None
    data: str
    paper: str | None
    path: Path


def names() -> list[str]:
    """The names that `find` takes."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml"))


def find(name: str | Path) -> Path:
    """The file of a configuration: a path goes before a recipe's name. Raises UserError with the nearest name."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    known = names()
    if str(name) in known:
        return CONFIGS / f"{name}.yaml"
    bare = str(name).removeprefix("configs/").removesuffix(".yaml")
    near = next((n for n in known if n.endswith(f"/{bare}")), None) or nearest(bare, known)
    wrong = "is a folder" if path.is_dir() else "is neither a file nor a recipe"
    remedy = f"the nearest recipe is {near}, " if near else ""
    raise UserError(f"no configuration {name}: it {wrong}; {remedy}`fewstep recipes` lists all")


def recipes() -> list[Recipe]:
    """All that a command of fewstep trains or searches by, in the order of their names.

    >>> [recipe.name for recipe in fewstep.recipes() if recipe.method == "scott"]
    ['emoji/scott', 'sd15/scott']
    """
    return list(_recipes())


def _recipes() -> Iterator[Recipe]:
    for name in names():
        path = CONFIGS / f"{name}.yaml"
        tree = read_yaml(path)
        if "stages" in tree:
            method, run = "train-teacher", {"data": tree.get("data"), **list(tree["stages"].values())[-1]}
        elif "method" in tree:
            method, run = tree["method"]["name"], tree
        else:
            continue  # a script's
        yield Recipe(name, method, _origin(run), run["data"]["name"], _paper(path), path)


def _origin(tree: dict[str, Any]) -> str | None:
    """The teacher of a run, the student of a search."""
    place: str | None = (tree.get("teacher") or tree.get("student") or {}).get("path")
    return place


def _paper(path: Path) -> str | None:
    head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    found = PAPER.search(head[0]) if head else None
    return found[0] if found else None
