"""What a network is told beside x_t and t."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Condition:
    """A network's keyword arguments, first dimension B each, and their value without a prompt.

    arguments  e.g. {"encoder_hidden_states": (B, L, D)}; nested dicts and tuples of tensors are allowed
               (SDXL's added_cond_kwargs, a ControlNet's residuals)
    empty      the same keys with first dimension 1: what the teacher was trained to see without a prompt; {} where it
               was not trained without (class labels), or is told nothing
    """

    arguments: dict[str, Any]
    empty: dict[str, Any]

    def __len__(self) -> int:
        return len(_first(self.arguments))

    def null(self) -> "Condition":
        """Every row without its prompt."""
        self._need_empty()
        n = len(self)
        rows = _map(lambda e: e.expand(n, *e.shape[1:]), self.empty)
        return Condition({**self.arguments, **rows}, self.empty)

    def drop(self, mask: Tensor) -> "Condition":
        """Rows where `mask` (B,) is true lose their prompt."""
        self._need_empty()

        def choose(a: Tensor, e: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), e.to(a), a)

        rows = _map(choose, {k: self.arguments[k] for k in self.empty}, self.empty)
        return Condition({**self.arguments, **rows}, self.empty)

    def _need_empty(self) -> None:
        if not self.empty:
            raise UserError(
                "guidance_scale: the network was never trained without its condition; set it to 1"
            )

    def with_(self, **arguments: Any) -> "Condition":
        """More keyword arguments, such as timestep_cond; they have no empty value, null() and drop() keep them."""
        return Condition({**self.arguments, **arguments}, self.empty)

    def rows(self, index: Tensor) -> "Condition":
        """The rows that `index` names."""
        return Condition(_map(lambda a: a[index], self.arguments), self.empty)

    def to(self, *args: Any) -> "Condition":
        return Condition(_map(lambda a: a.to(*args), self.arguments), _map(lambda e: e.to(*args), self.empty))

    @staticmethod
    def cat(parts: "Sequence[Condition]") -> "Condition":
        """Rows of all parts, in order."""
        joined = _map(lambda *a: torch.cat(a), *[p.arguments for p in parts])
        return Condition(joined, parts[0].empty)


def _map(f: Any, *trees: Any) -> Any:
    if isinstance(trees[0], dict):
        return {k: _map(f, *[t[k] for t in trees]) for k in trees[0]}
    if isinstance(trees[0], tuple):
        return tuple(_map(f, *rows) for rows in zip(*trees, strict=True))
    return f(*trees)


def _first(tree: Any) -> Tensor:
    while isinstance(tree, dict):
        tree = next(iter(tree.values()))
    return tree
