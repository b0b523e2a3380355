"""A checkpoint whose parts do not fit the run: one line each, that names the file and the remedy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.ema import EMA
from fewstep.distill.errors import UserError
from fewstep.distill.training.resume import progress_of, restore_average, restore_optimisers
from torch import nn

SOURCE = Path("run/checkpoint-4")


def parts(width: int = 3, kind: type = torch.optim.AdamW) -> tuple[nn.Linear, dict[str, Any], dict[str, Any]]:
    """A layer, and its optimiser and schedule after one step."""
    layer = nn.Linear(width, 2)
    optimiser = kind(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    layer(torch.ones(1, width)).sum().backward()
    optimiser.step()
    schedule.step()
    return layer, {"student": optimiser}, {"student": schedule}


def kept(optimisers: dict[str, Any], schedules: dict[str, Any]) -> dict[str, Any]:
    return {
        "players": {k: o.state_dict() for k, o in optimisers.items()},
        "schedules": {k: s.state_dict() for k, s in schedules.items()},
        "scaler": {},
    }


def test_optimisers_come_back() -> None:
    _, optimisers, schedules = parts()
    _, others, their = parts()
    for state in others["student"].state.values():
        state["exp_avg"].fill_(7)
    restore_optimisers(optimisers, schedules, None, kept(others, their), SOURCE)
    assert all((s["exp_avg"] == 7).all() for s in optimisers["student"].state.values())
    assert schedules["student"].last_epoch == 1


def damaged(name: str) -> Any:
    whole = kept(*parts()[1:])
    groups = whole["players"]["student"]["param_groups"]
    return {
        "no dictionary": [whole],
        "no players": {k: v for k, v in whole.items() if k != "players"},
        "no schedules": {k: v for k, v in whole.items() if k != "schedules"},
        "null": {**whole, "players": None},
        "another player": {**whole, "players": {"fake": whole["players"]["student"]}},
        "a player more": {**whole, "players": {**whole["players"], "fake": {}}},
        "an empty state": {**whole, "players": {"student": {}}},
        "an empty schedule": {**whole, "schedules": {"student": {}}},
        "fewer parameters": {
            **whole,
            "players": {"student": {"state": {}, "param_groups": [{**groups[0], "params": [0]}]}},
        },
        "other shapes": kept(*parts(width=5)[1:]),
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no dictionary", "its value: input should be a valid dictionary"),
        ("no players", "players: field required"),
        ("no schedules", "schedules: field required"),
        ("null", "players: input should be a valid dictionary"),
        ("another player", "is of fake, this method trains student"),
        ("a player more", "is of fake, student, this method trains student"),
        ("an empty state", "does not fit the optimiser of student (KeyError"),
        ("an empty schedule", "does not fit the optimiser of student (KeyError"),
        ("fewer parameters", "doesn't match the size"),
        ("other shapes", "exp_avg is (2, 5), the parameter (2, 3)"),
    ],
)
def test_optimisers_that_do_not_fit(name: str, said: str) -> None:
    _, optimisers, schedules = parts()
    with pytest.raises(UserError) as error:
        restore_optimisers(optimisers, schedules, None, damaged(name), SOURCE)
    line = str(error.value)
    assert "run/checkpoint-4/optimizers.pt" in line and said in line and "\n" not in line
    assert "choose another checkpoint" in line


def test_fp16_needs_its_scale() -> None:
    _, optimisers, schedules = parts()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UserError, match=r"mixed_precision: fp16, but run/checkpoint-4 was trained otherwise"):
        restore_optimisers(optimisers, schedules, scaler, kept(optimisers, schedules), SOURCE)
    state = {**scaler.state_dict(), "scale": 8.0}
    restore_optimisers(
        optimisers, schedules, scaler, {**kept(optimisers, schedules), "scaler": state}, SOURCE
    )
    assert scaler.get_scale() == 8.0


def test_averages_with_and_without() -> None:
    layer, *_ = parts()
    ema = EMA(dict(layer.named_parameters()), 0.9)
    state = {k: v + 1 for k, v in ema.state_dict().items()}
    restore_average(ema, state, SOURCE)
    assert all(torch.equal(v, state[k]) for k, v in ema.state_dict().items())
    restore_average(None, {}, SOURCE)
    for average, found, said in (
        (ema, {}, "use_ema: true, but run/checkpoint-4 holds no averages; set it to false"),
        (None, state, "use_ema: false, but run/checkpoint-4 was trained with averages; set it to true"),
        (ema, {k: v for k, v in state.items() if k != "weight"}, "averages of another model (Missing key"),
        (ema, {**state, "weight": torch.zeros(5)}, "averages of another model (size mismatch for weight"),
    ):
        with pytest.raises(UserError) as error:
            restore_average(average, found, SOURCE)
        assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ({}, "progress.json: updates: field required"),
        ({"updates": {"student": 4}}, "progress.json: seconds: field required"),
        ({"updates": {"student": -4}, "seconds": 1.0}, "updates.student: input should be greater"),
        ({"updates": {"student": "x"}, "seconds": 1.0}, "updates.student: input should be a valid integer"),
        ({"updates": [4], "seconds": 1.0}, "updates: input should be a valid dictionary"),
        ({"updates": {"student": 4}, "seconds": float("nan")}, "seconds: input should be"),
        ({"updates": {"fake": 4}, "seconds": 1.0}, "is of fake, this method trains student"),
    ],
)
def test_progress_that_does_not_fit(progress: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        progress_of(progress, {"student"}, SOURCE)
    assert said in str(error.value) and "run/checkpoint-4/progress.json" in str(error.value)
    assert progress_of({"updates": {"student": 4}, "seconds": 2}, {"student"}, SOURCE) == (
        {"student": 4},
        2.0,
    )
