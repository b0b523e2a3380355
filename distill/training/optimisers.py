"""Optimisers of a run by name, and how they are taken up again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..config.run import RunConfig
from ..errors import UserError


def optimiser(c: RunConfig, parameters: list[nn.Parameter], own: dict[str, Any]) -> torch.optim.Optimizer:
    """`own`: a player's arguments in place of the run's."""
    shared: dict[str, Any] = {
        "lr": c.learning_rate,
        "betas": (c.adam_beta1, c.adam_beta2),
        "weight_decay": c.adam_weight_decay,
        "eps": c.adam_epsilon,
        **own,
    }
    if c.optimizer == "radam":
        return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **shared)
    if c.optimizer == "adamw_8bit":
        return adamw_8bit()(parameters, **shared)
    return torch.optim.AdamW(parameters, **shared)


def adamw_8bit() -> Any:
    """AdamW with moments of 8 bits in blocks (arXiv 2110.02861). Raises UserError where no package has it."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "optimizer: adamw_8bit needs torchao or bitsandbytes; pip install 'fewstep[quantise]', or set adamw"
            ) from None
    return AdamW8bit


def restore(
    optimiser: torch.optim.Optimizer,
    schedule: LambdaLR,
    saved: dict[str, Any],
    saved_schedule: dict[str, Any],
) -> None:
    """Moments and counts of a checkpoint, under the rate, betas, epsilon and decay that this run was given."""
    own = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimiser.param_groups]
    rates = list(schedule.base_lrs)
    optimiser.load_state_dict(saved)
    schedule.load_state_dict(saved_schedule)
    schedule.base_lrs = rates
    for group, settings, rate, factor in zip(
        optimiser.param_groups, own, rates, schedule.lr_lambdas, strict=True
    ):
        now = rate * factor(schedule.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(now)
        else:
            group["lr"] = now
        group.update(settings)
    schedule._last_lr = [group["lr"] for group in optimiser.param_groups]
