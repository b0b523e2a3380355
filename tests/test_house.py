"""The plan of the house: few files at its root, no file that does more than one thing, a word for every room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [p for room in ("distill", "kernels", "pipelines") for p in (ROOT / room).rglob("*.py")]
LONGEST = 300  # lines


def test_the_root_of_distill_has_six_files_at_most() -> None:
    assert len(list((ROOT / "distill").glob("*.py"))) <= 6


@pytest.mark.parametrize("file", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_what_one_thing_takes(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "room", sorted({p.parent for p in CODE if "teachers" not in p.parts}), ids=lambda p: p.name
)
def test_every_room_says_what_it_is_for(room: Path) -> None:
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
