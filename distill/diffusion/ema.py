"""Exponential moving averages of trained parameters, held as buffers so that checkpoints carry them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """average <- decay * average + (1 - decay) * parameter, over the given named parameters only.

    For a LoRA student these are the adapter's weights, so the average costs no second network. With `warmup` the
    decay of update n is min(decay, (1 + n) / (10 + n)). With `std` it is `power_decay`'s in place of `decay`.
    """

    updates: Tensor

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        warmup: bool = False,
        std: float | None = None,
    ):
        super().__init__()
        self._parameters_by_name = dict(parameters)
        self.decay, self.warmup, self.std = decay, warmup, std
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for name, p in parameters.items():
            self.register_buffer(_key(name), p.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """The averages under the parameters' own names."""
        return {name: getattr(self, _key(name)) for name in self._parameters_by_name}

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """One step of the average; `decay` in place of its own for this step."""
        decay = self.decay if decay is None else decay
        if self.std is not None:
            decay = power_decay(int(self.updates) + 1, self.std)
        elif self.warmup:
            n = int(self.updates)
            decay = min(decay, (1 + n) / (10 + n))
        sources = [p.detach() for p in self._parameters_by_name.values()]
        torch._foreach_lerp_(list(self.tensors().values()), sources, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the parameters hold their averages, and the averages the parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors().items():
            p = self._parameters_by_name[name]
            held = p.detach().clone()
            p.copy_(average)
            average.copy_(held)


def power_decay(update: int, std: float) -> float:
    """(1 - 1/(k + 1))^(gamma + 1), k = 1, 2, ...: an average whose memory grows with the run (EDM2, arXiv 2312.02696).

    std: standard deviation of its memory as a share of the run so far; gamma is the largest root of
    z^3 + 7 z^2 + (16 - 1/std^2) z + 12 - 1/std^2 (algorithm 2 there). std 0.05 gives gamma 16.97, 0.1 gives 6.94.
    """
    gamma = np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()
    return float((1 - 1 / (update + 1)) ** (gamma + 1))


def _key(name: str) -> str:
    return name.replace(".", "/")
