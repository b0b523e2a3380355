"""What every method is: settings, players, one forward per turn."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...pipelines.export import Export
from ..data.cache import LatentCache
from ..diffusion.condition import Condition
from ..diffusion.draws import Draws
from ..errors import UserError
from ..models.codec import Autoencoder, Codec
from ..models.teacher import LatentTeacher, Teacher
from ..scorers.rewards import Reward, load_reward
from ..scorers.vision import Vision
from ..settings import MethodSettings, StudentSettings


@dataclass
class Batch:
    """One micro-batch of B samples. A field that the method did not ask for in `needs` is None.

    images    (B, 3, H, W) in [-1, 1]
    latents   (B, 2C, h, w) posterior mean and log-variance of the autoencoder, unscaled
    condition the prompts or class labels as the network's keyword arguments
    captions  B strings
    draws     this batch's random numbers
    rows      their numbers in the data
    """

    draws: Draws
    images: Tensor | None = None
    latents: Tensor | None = None
    condition: Condition | None = None
    captions: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """iteration: 0-based; total: iterations of the whole run; updates: optimiser steps made so far per player."""

    iteration: int
    total: int
    updates: Mapping[str, int]


@dataclass(frozen=True)
class Rehearsal:
    """What the exported pipeline's call must give: x0 (B, C, H, W) of the method's own sampler, for comparison.

    inputs  the call's arguments beside those of sampling.json, its generators and its output_type
    pixels  whether the pipeline gives no raw samples, but pictures in [0, 1]
    """

    x0: Tensor
    inputs: dict[str, Any]
    pixels: bool = False


@dataclass(frozen=True)
class Parts:
    """What a method is built from.

    captions    those of the training data, in its order
    classes     names of the data's classes in the order of their labels, empty where there are none
    resolution  side of the training images in pixels
    reward      gives the reward of a name
    vae         the autoencoder that stands in for a teacher's, None where there is none
    vision      loads frozen networks that look at pictures
    """

    teacher: Teacher | None
    student: StudentSettings
    captions: list[str]
    classes: tuple[str, ...] = ()
    resolution: int | None = None
    reward: Callable[[str], Reward] = load_reward
    vae: Autoencoder | None = None
    vision: Vision = field(default_factory=Vision)

    @property
    def codec(self) -> Codec | None:
        """Between pictures and latents: the latent teacher's or `vae`; None where samples are pixels."""
        return self.teacher if isinstance(self.teacher, LatentTeacher) else self.vae

    def check(self, needs: frozenset[str]) -> None:
        """UserError for a `vae` that a method with these needs would not use."""
        if self.vae is not None and self.codec is not self.vae:
            raise UserError("vae: the teacher has an autoencoder of its own; leave the key out")
        if self.vae is not None and "latents" not in needs:
            raise UserError("vae: this method does not work in latents here; leave the key out")

    def need_teacher(self) -> Teacher:
        if self.teacher is None:
            raise UserError("teacher: missing; this method needs `teacher: {path: ...}`")
        return self.teacher

    def need_latent_teacher(self) -> LatentTeacher:
        teacher = self.need_teacher()
        if not isinstance(teacher, LatentTeacher):
            raise UserError(
                f"teacher.path: {teacher.path} works on pixels; this method needs a StableDiffusionPipeline"
            )
        return teacher

    def need_no_student(self, instead: str) -> None:
        """Refuses keys of a student where none is trained; `instead`: what is."""
        if self.student != StudentSettings():
            raise UserError(f"student: {instead}; leave the key out")


class Method(nn.Module, ABC):
    """A loss and the state it owns. Knows tensors, a student and perhaps a teacher; never devices or files.

    Subclasses set `Settings` and `needs` (what they read of a batch: images, latents, prompts, labels; at the latest in
    their constructor). They take (settings, parts), and implement `players`, `forward`, `pictures` and `export`.
    What a checkpoint holds: parameters that require a gradient, and every persistent buffer.
    """

    Settings: ClassVar[type[MethodSettings]]
    needs: frozenset[str] = frozenset()

    def __init__(self, settings: Any, parts: Parts):
        super().__init__()
        self.settings, self.parts = settings, parts

    @abstractmethod
    def players(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of each player, which has an optimiser of its own; the first is what is exported."""

    def optimiser(self, player: str) -> dict[str, Any]:
        """AdamW's arguments of this player that differ from the run's: lr, betas, eps, weight_decay."""
        return {}

    def averaged(self) -> dict[str, nn.Parameter]:
        """Parameters by name whose averages pictures and export use where use_ema is set: the first player's."""
        exported = {id(p) for p in next(iter(self.players().values()))}
        return {k: p for k, p in self.named_parameters() if id(p) in exported}

    def passed_through(self) -> list[nn.Module]:
        """Frozen networks of a teacher that gradients pass through: gradient_checkpointing reaches them too."""
        return []

    def turns(self, progress: Progress) -> tuple[str, ...]:
        """The players that move in this iteration, in order."""
        return tuple(self.players())

    def prepare(self, latents: LatentCache) -> None:
        """Called once before the first step, in every process, where `needs` has latents: what is measured on all of
        them. Kept in buffers: a resumed run has it from its checkpoint."""

    @abstractmethod
    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        """0-d tensors: "loss" is minimised, the rest are diagnostics. `carry` hands tensors to later turns."""

    def after(self, player: str) -> None:
        """Called after the optimiser step of `player`: moving targets are updated here."""

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        """Rows of validation pictures (N, 3, H, W) in [-1, 1] by title, from the same noise every time."""
        return {}

    def rehearsal(
        self, captions: list[str], num_steps: int, generators: list[torch.Generator]
    ) -> Rehearsal | None:
        """The method's own samples in as many steps as a call of sampling.json has; None where there is no sampler."""
        return None

    @abstractmethod
    def export(self) -> Export:
        """What the runner writes to pipeline/."""
