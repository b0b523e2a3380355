"""The checkpoints that a run folder holds, by their names and their records of progress."""

import re
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from ..readers import Unreadable, read_json

PROGRESS = "progress.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class ProgressFile(TypedDict):
    """updates: optimiser steps of each player; seconds: in the loop; batch: pictures of a step, of all processes."""

    updates: dict[str, int]
    seconds: float
    batch: NotRequired[int]


def saved_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    found = (CHECKPOINT.fullmatch(p.name) for p in run.glob("checkpoint-*"))
    return sorted(int(m[1]) for m in found if m)


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def progress_of(checkpoint: Path) -> ProgressFile | None:
    """None where it cannot be read."""
    try:
        progress: ProgressFile = read_json(checkpoint / PROGRESS, ProgressFile)
        return progress
    except (FileNotFoundError, Unreadable):
        return None
