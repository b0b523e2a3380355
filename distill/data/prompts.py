"""Prompts of the user: lines of text files."""

from pathlib import Path

from ..errors import UserError
from ..readers import Unreadable, read_text


def read_prompts(path: str) -> list[str]:
    """The lines of a text file, or of every .txt file below a folder in the order of their names; blank ones are left
    out, repeated ones stay. Only a newline ends a line. UserError where there are none."""
    place = Path(path).expanduser()
    files = sorted(f for f in place.rglob("*.txt") if f.name[0] != ".") if place.is_dir() else [place]
    try:
        lines = [line.strip() for file in files for line in read_text(file).split("\n")]
    except FileNotFoundError:
        raise UserError(
            f"data.prompts: no file {path}; give a text file with one prompt a line, or a folder"
        ) from None
    except Unreadable as error:
        raise UserError(f"data.prompts: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"data.prompts: {path} holds no prompts; write one a line, in .txt files")
    return prompts
