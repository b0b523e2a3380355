"""Pipelines that bring code of their own: ours runs unasked, others' when the user says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len

from ...pipelines import export
from ..errors import UserError
from ..metrics.lite import hash_file
from ..readers import fitting, read_json

OURS = Path(export.__file__).parent
INDEX = "model_index.json"
REMEDY = "export or fetch the pipeline again"


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, whose `_class_name` is a class, or [file, class] of a pipeline with its own code.

    Raises FileNotFoundError, and UserError for anything else that cannot be used.
    """
    index: dict[str, Any] = read_json(folder / INDEX, dict[str, Any], remedy=REMEDY)
    named = index.get("_class_name")
    kind = Annotated[list[str], Len(2, 2)] if isinstance(named, list) else str
    fitting(named, f"{folder / INDEX}: _class_name", kind, remedy=REMEDY)
    return index


def own_code(folder: Path) -> list[Path]:
    """The files in a pipeline folder that diffusers runs to load it, as model_index.json names them; most have none.

    Raises UserError if the one with the pipeline's class is missing, and for an index that cannot be read.
    """
    try:
        index = read_index(folder)
    except FileNotFoundError:
        return []
    named, files = index["_class_name"], []
    if isinstance(named, list):
        files.append(folder / f"{named[0]}.py")
        if not files[0].is_file():
            raise UserError(
                f"{folder}: its class is in {named[0]}.py, which is not there; copy it beside the index"
            )
    for part, value in index.items():
        if isinstance(value, list) and value and not part.startswith("_"):
            files.append(folder / part / f"{value[0]}.py")
    return [file for file in files if file.is_file()]


def may_run(folder: Path, trust_remote_code: bool) -> bool:
    """Whether a pipeline folder has code that may run: every .py file in it is one of ours, or the user trusts it.

    Raises UserError where it needs code that is neither.
    """
    if not own_code(folder):
        return False
    if not trust_remote_code:
        known = {hash_file(path) for path in OURS.glob("*.py")}
        for path in _python_files(folder):
            if hash_file(path) not in known:
                raise UserError(
                    f"{folder}: runs code of its own, {path.relative_to(folder)}; read it, and give "
                    "--trust_remote_code if you trust it"
                )
    return True


def _python_files(folder: Path) -> Iterator[Path]:
    """In links to folders too, as diffusers finds them there."""
    for root, _, names in os.walk(folder, followlinks=True):
        yield from (Path(root) / name for name in sorted(names) if name.endswith(".py"))
