"""What is not finite, when something is: nothing broken is saved, and the message says where it began."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.quantise import plain_parts
from ..models.teacher import Teacher
from .batches import Batches
from .contract import Batch

MAX_SKIPPED = 40  # fp16: the loss's scale of 65536 is halved by each, and below 1e-7 by then


def first_broken(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor that has something else than finite numbers."""
    for name, value in tensors:
        for part in () if value is None else plain_parts(value.detach()):
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                return name
    return None


def check_saved(state: Mapping[str, Tensor], step: int, remedy: str) -> None:
    """Raises UserError for trained weights or averages that are not finite, before they are written."""
    broken = first_broken(state.items())
    if broken is not None:
        raise UserError(f"step {step}: the weight {broken} is not finite, so nothing was saved; {remedy}")


class Blame:
    """Names the cause of a loss or a gradient that is not finite: the data, the teacher, the weights, or the step."""

    def __init__(
        self, precision: str, scaled: bool, batches: Batches, teacher: Teacher | None, method: nn.Module
    ):
        """precision: "no", "fp16" or "bf16"; scaled: whether steps that are not finite are skipped (fp16 on GPUs)."""
        self.precision, self.scaled = precision, scaled
        self.batches, self.teacher, self.method = batches, teacher, method
        self.skipped = 0

    def check(
        self,
        step: int,
        player: str,
        loss: float,
        parts: list[Batch],
        remedy: str,
    ) -> None:
        """Called where the gradient of `player` or its loss was not finite. Raises UserError that says what it was.

        Where a scaler skips such a step and lowers the scale of the loss, only data, weights, and MAX_SKIPPED steps in
        a row end the run.
        """
        self._check_data(step, parts)
        self._check_weights(step, remedy)
        self.skipped += 1
        if self.scaled and self.skipped < MAX_SKIPPED:
            return
        often = f" in {self.skipped} steps in a row, whatever its scale" if self.scaled else ""
        rows = [row for batch in parts for row in batch.rows]
        named = f"rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of the data"
        what = (
            f"the gradient of {player} is not finite"
            if math.isfinite(loss)
            else f"the loss of {player} is {loss}"
        )
        cause = f"{what} on {named}{often}"
        if self.precision != "no":
            remedy = (
                f"use --mixed_precision {'bf16 or no' if self.precision == 'fp16' else 'no'}, or {remedy}"
            )
        raise UserError(f"step {step}: {cause}; {remedy}")

    def _check_data(self, step: int, parts: list[Batch]) -> None:
        for batch in parts:
            found = self.batches.not_finite(batch)
            if found is not None:
                row, cache = found
                remedy = "mend the data" if cache is None else f"delete {cache}, the command makes it again"
                raise UserError(f"step {step}: {row} is not finite; {remedy}")

    def _check_weights(self, step: int, remedy: str) -> None:
        if self.teacher is not None:
            network = self.teacher.denoiser.network
            broken = first_broken((k, p) for k, p in network.named_parameters() if not p.requires_grad)
            if broken is not None:
                raise UserError(
                    f"teacher.path: the weight {broken} of {self.teacher.path} is not finite; use whole weights"
                )
        broken = first_broken((k, p) for k, p in self.method.named_parameters() if p.requires_grad)
        if broken is not None:
            raise UserError(f"step {step}: the weight {broken} is not finite after the step before; {remedy}")
