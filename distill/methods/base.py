"""What every method is: settings, players, one forward per turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..condition import Condition
from ..draws import Draws


@dataclass
class Batch:
    """One micro-batch of B samples. A field that the method did not ask for in `needs` is None.

    images    (B, 3, H, W) in [-1, 1]
    latents   (B, 2C, h, w) posterior mean and log-variance of the autoencoder, unscaled
    condition the prompts as the network's keyword arguments
    captions  B strings
    draws     this batch's random numbers
    """

    draws: Draws
    images: Tensor | None = None
    latents: Tensor | None = None
    condition: Condition | None = None
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """iteration: 0-based; total: iterations of the whole run; updates: optimiser steps made so far per player."""

    iteration: int
    total: int
    updates: Mapping[str, int]


class Method(nn.Module):
    """A loss and the state it owns. Knows tensors, a student and perhaps a teacher; never devices or files.

    Subclasses set `needs` to the batch fields they read, and implement `players`, `forward` and `export`.
    What a checkpoint holds: parameters that require a gradient, and every persistent buffer.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of each player; each player has an optimiser of its own."""
        raise NotImplementedError

    def turns(self, progress: Progress) -> tuple[str, ...]:
        """The players that move in this iteration, in order."""
        return tuple(self.players())

    def forward(self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]) -> dict[str, Tensor]:
        """0-d tensors: "loss" is minimised, the rest are diagnostics. `carry` hands tensors to later turns."""
        raise NotImplementedError

    def after(self, player: str) -> None:
        """Called after the optimiser step of `player`: moving targets are updated here."""

    @torch.no_grad()
    def pictures(self, noise_seed: int, captions: list[str]) -> dict[str, Tensor]:
        """Validation pictures in [0, 1], (N, 3, H, W) per row title, from fixed noise."""
        raise NotImplementedError

    def export(self) -> Any:
        """What the runner writes to pipeline/: a `pipelines.export.Export`."""
        raise NotImplementedError
