"""Exponential moving averages of trained parameters, held as buffers so that checkpoints carry them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """average <- decay * average + (1 - decay) * parameter, over the given named parameters only.

    For a LoRA student these are the adapter's weights, so the average costs no second network. With `warmup` the
    decay of update n is min(decay, (1 + n) / (10 + n)).
    """

    updates: Tensor

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, warmup: bool = False):
        super().__init__()
        self._parameters_by_name = dict(parameters)
        self.decay, self.warmup = decay, warmup
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
        if self.warmup:
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


def _key(name: str) -> str:
    return name.replace(".", "/")
