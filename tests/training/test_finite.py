"""Skipped steps of half precision: how many are too many, and what is said then."""

import math
from typing import Any

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.training.finite import MAX_SKIPPED, Blame, check_saved
from torch import nn


def blame(precision: str) -> Blame:
    batches: Any = None  # no batch is given to look at
    return Blame(precision, precision == "fp16", batches, None, nn.Linear(2, 2))


def test_half_precision_may_skip_some_steps_in_a_row() -> None:
    step = blame("fp16")
    for _ in range(2):
        for i in range(MAX_SKIPPED - 1):
            step.check(i + 1, "student", math.inf, [], "lower --learning_rate")
        step.skipped = 0  # a whole step
    step.skipped = MAX_SKIPPED - 1
    with pytest.raises(
        UserError, match=r"step 99: the loss of student is inf .* in 40 steps in a row.*bf16 or no"
    ):
        step.check(99, "student", math.inf, [], "lower --learning_rate")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_precisions_may_not(precision: str) -> None:
    with pytest.raises(UserError, match=r"step 3: the gradient of student is not finite on ") as error:
        blame(precision).check(3, "student", 1.0, [], "lower --learning_rate")
    assert ("--mixed_precision no" in str(error.value)) == (precision == "bf16")


def test_broken_weights_end_half_precision_at_once() -> None:
    step = blame("fp16")
    with torch.no_grad():
        step.method.weight[1, 0] = torch.nan  # type: ignore[index, operator]
    with pytest.raises(
        UserError, match=r"step 3: the weight weight is not finite after the step before; lower"
    ):
        step.check(3, "student", 1.0, [], "lower --learning_rate")


def test_integers_and_whole_numbers_may_be_saved() -> None:
    check_saved({"updates": torch.tensor(3), "a": torch.ones(2)}, 1, "")
    with pytest.raises(UserError, match=r"step 1: the weight b is not finite, so nothing was saved; mend it"):
        check_saved({"a": torch.ones(2), "b": torch.tensor([1.0, -torch.inf])}, 1, "mend it")
