"""What a checkpoint holds beside the method's weights put back: a part that does not fit is one line."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..diffusion.ema import EMA
from ..errors import UserError
from ..readers import fitting
from .checkpoint import OPTIMISERS
from .optimisers import restore
from .run_folder import Count, Seconds
from .saved import PROGRESS

REMEDY = "choose another checkpoint, or --resume_from_checkpoint null and a new --output_dir"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Kept(TypedDict):
    """optimizers.pt: the states of each player's optimiser and schedule, and of fp16's scaler, {} without."""

    players: dict[str, dict[str, Any]]
    schedules: dict[str, dict[str, Any]]
    scaler: dict[str, Any]


class Progress(TypedDict):
    """progress.json: updates of each player, and seconds in the loop."""

    updates: dict[str, Count]
    seconds: Seconds


def restore_average(ema: EMA | None, state: dict[str, Tensor], source: Path) -> None:
    """Raises UserError for averages that the checkpoint lacks, has in vain, or has of another model."""
    if ema is None:
        if state:
            raise UserError(
                f"use_ema: false, but {source} was trained with averages; set it to true, or {REMEDY}"
            )
        return
    if not state:
        raise UserError(f"use_ema: true, but {source} holds no averages; set it to false, or {REMEDY}")
    try:
        ema.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"resume_from_checkpoint: {source} holds averages of another model ({reason}); {REMEDY}"
        ) from error


def restore_optimisers(
    optimisers: Mapping[str, Any], schedules: Mapping[str, Any], scaler: Any | None, kept: Any, source: Path
) -> None:
    """Raises UserError for states of other players, parameters or optimisers, and without those of fp16."""
    path = source / OPTIMISERS
    kept = fitting(kept, path, Kept, remedy=REMEDY)
    _same_players(kept["players"], optimisers, path)
    _same_players(kept["schedules"], schedules, path)
    if scaler is not None and not kept["scaler"]:
        raise UserError(
            f"mixed_precision: fp16, but {source} was trained otherwise; do the same, or {REMEDY}"
        )
    for name, optimiser in optimisers.items():
        try:
            restore(optimiser, schedules[name], kept["players"][name], kept["schedules"][name])
            _check_moments(optimiser)
        except (
            Exception
        ) as error:  # torch, torchao and bitsandbytes have no common class for what does not fit
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(
                f"resume_from_checkpoint: {path} does not fit the optimiser of {name} ({reason}); {REMEDY}"
            ) from error
    if scaler is not None:
        scaler.load_state_dict(kept["scaler"])


def progress_of(progress: Any, players: Collection[str], source: Path) -> tuple[dict[str, int], float]:
    """Updates of each player and seconds. Raises UserError for a record that lacks one or is of other players."""
    found = fitting(progress, source / PROGRESS, Progress, remedy=REMEDY)
    _same_players(found["updates"], players, source / PROGRESS)
    return dict(found["updates"]), found["seconds"]


def _same_players(found: Collection[str], expected: Collection[str], path: Path) -> None:
    if {*found} != {*expected}:
        there, here = (", ".join(sorted(names)) or "none" for names in (found, expected))
        raise UserError(f"resume_from_checkpoint: {path} is of {there}, this method trains {here}; {REMEDY}")


def _check_moments(optimiser: torch.optim.Optimizer) -> None:
    """ValueError for moments of another shape than their parameter's, which torch finds at the next step or never."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state = optimiser.state.get(parameter, {})
            for key in MOMENTS:
                if key in state and state[key].shape != parameter.shape:
                    there, here = (tuple(x.shape) for x in (state[key], parameter))
                    raise ValueError(f"{key} is {there}, the parameter {here}")
