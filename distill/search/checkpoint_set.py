"""The raw weights that a run kept, read one tensor at a time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from ..readers import fitting, open_tensors
from ..training.run_folder import LOG, log_lines

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class CheckpointSet:
    """Sets of weights of one run, `steps` increasing; all have the same names, shapes and types of tensors."""

    run: Path
    steps: tuple[int, ...]

    @classmethod
    def of(cls, run: Path, last: int | None = None) -> "CheckpointSet":
        """Those in raw_weights/, or the `last` of them. Raises UserError for fewer than 2 and for unequal ones."""
        found = (
            re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in (run / "raw_weights").glob("step-*")
        )
        steps = sorted(int(m[1]) for m in found if m)
        if last is not None and last > len(steps):
            raise UserError(f"method.last: {last}, but {run}/raw_weights holds {len(steps)}; lower it")
        if len(steps) < 2:
            raise UserError(
                f"student.path: {run}/raw_weights holds {len(steps)} sets of weights; train with "
                "--raw_weights.every N --raw_weights.keep K"
            )
        out = cls(run, tuple(steps[-last:] if last else steps))
        out.check()
        return out

    def __len__(self) -> int:
        return len(self.steps)

    def path(self, i: int) -> Path:
        return self.run / "raw_weights" / f"step-{self.steps[i]:08d}.safetensors"

    @cached_property
    def files(self) -> list[Any]:
        """Open files, of which nothing is in memory but what is asked for."""
        return [open_tensors(self.path(i), remedy="train again") for i in range(len(self))]

    def check(self) -> None:
        first, *others = (self.layout(i) for i in range(len(self)))
        for i, other in enumerate(others, 1):
            odd = sorted(k for k in {*first, *other} if first.get(k) != other.get(k))
            if odd:
                raise UserError(
                    f"{self.path(i)}: {odd[0]} is {other.get(odd[0])}, in {self.path(0).name} "
                    f"{first.get(odd[0])}; combine weights of one run and architecture"
                )

    def layout(self, i: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor of a set, read without the tensor."""
        slices = {k: self.files[i].get_slice(k) for k in self.files[i].keys()}  # noqa: SIM118
        return {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}

    @property
    def names(self) -> list[str]:
        return list(self.files[0].keys())

    def tensor(self, i: int, name: str) -> Tensor:
        return self.files[i].get_tensor(name)

    def combined(self, name: str, alpha: Sequence[float]) -> Tensor:
        """sum(alpha_i theta_i) of one tensor, summed in float64, in its own type; one that is no float is the last."""
        first = self.tensor(len(self) - 1, name)
        if not first.is_floating_point():
            return first
        total = torch.zeros(first.shape, dtype=torch.float64)
        for i, a in enumerate(alpha):
            if a != 0:
                total.add_(self.tensor(i, name).double(), alpha=float(a))
        return total.to(first.dtype)

    def losses(self) -> list[float]:
        """Mean of the logged losses since the checkpoint before, of each. Raises UserError where none was logged."""
        log = self.run / LOG
        try:
            rows = [dict[str, Any](row) for _, row in log_lines(log)]
        except FileNotFoundError:
            raise UserError(f"method.metric: {log} is missing; restore it, or use metric step") from None
        spacing = self.steps[1] - self.steps[0]
        out = []
        for before, step in zip((self.steps[0] - spacing, *self.steps), self.steps, strict=False):
            within = (r for r in rows if before < r["step"] <= step)
            logged = [
                fitting(r[k], f"{log}: step {r['step']}: {k}", Finite, remedy="use metric step")
                for r in within
                for k in ("loss", "student/loss")
                if k in r
            ]
            if not logged:
                raise UserError(
                    f"method.metric: {self.run}/{LOG} has no loss between steps {before} and {step}; train with "
                    f"--logging_steps {spacing} or less, or use metric step"
                )
            out.append(sum(logged) / len(logged))
        return out
