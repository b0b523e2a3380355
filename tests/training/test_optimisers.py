"""An optimiser that is taken up again: its moments are the checkpoint's, its settings this run's."""

from typing import Any

import pytest
import torch
from fewstep.distill.config.run import RunConfig
from fewstep.distill.training.optimisers import optimiser, restore
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def made(rate: float, beta: float = 0.9) -> tuple[nn.Parameter, torch.optim.Optimizer, LambdaLR]:
    data: Any = {"name": "emoji"}
    c = RunConfig(output_dir="run", method={"name": "lcd"}, data=data, learning_rate=rate, adam_beta1=beta)
    weight = nn.Parameter(torch.linspace(-1, 1, 5))
    adam = optimiser(c, [weight], {})
    return weight, adam, LambdaLR(adam, lambda step: 1 / (1 + step))


def step(weight: nn.Parameter, adam: torch.optim.Optimizer, schedule: LambdaLR) -> torch.Tensor:
    """The change of the weights; the gradients are the same for all."""
    before = weight.detach().clone()
    weight.grad = torch.arange(5.0) - schedule.last_epoch
    adam.step()
    schedule.step()
    return weight.detach() - before


def taken_up(rate: float, beta: float = 0.9) -> torch.Tensor:
    """The fourth step's change, after three at 1e-2."""
    weight, *first = made(1e-2)
    for _ in range(3):
        step(weight, *first)
    again, adam, schedule = made(rate, beta)
    with torch.no_grad():
        again.copy_(weight)
    restore(adam, schedule, first[0].state_dict(), first[1].state_dict())
    assert adam.param_groups[0]["lr"] == rate / 4 == schedule.get_last_lr()[0]
    return step(again, adam, schedule)


def test_the_same_settings_go_on_bit_for_bit() -> None:
    weight, *plain = made(1e-2)
    changes = [step(weight, *plain) for _ in range(4)]
    assert torch.equal(taken_up(1e-2), changes[3])


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_another_rate_holds_from_the_first_step_on(factor: float) -> None:
    """AdamW's change is proportional to the rate."""
    torch.testing.assert_close(taken_up(factor * 1e-2), factor * taken_up(1e-2), rtol=1e-4, atol=1e-9)


def test_other_betas_hold() -> None:
    assert not torch.allclose(taken_up(1e-2, beta=0.5), taken_up(1e-2), rtol=1e-2)
