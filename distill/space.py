"""Where a method works: the samples that it denoises, and what the network is told beside them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from .condition import Condition
from .errors import UserError
from .methods.base import Batch, Parts
from .teacher import LatentTeacher


class Space(ABC):
    """shape (C, H, W) of a sample; needs: the batch fields that `samples` and conditions come from."""

    shape: tuple[int, int, int]
    needs: frozenset[str]

    @abstractmethod
    def samples(self, batch: Batch) -> Tensor:
        """Clean samples x0 (B, C, H, W)."""

    @abstractmethod
    def condition(self, captions: Sequence[str]) -> Condition:
        """What the network is told for these captions; class names for a class-conditional network."""

    def told(self, batch: Batch) -> Condition:
        """The batch's own condition."""
        return batch.condition or Condition({}, {})

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """RGB pictures (B, 3, H', W'), about [-1, 1]."""


class LatentSpace(Space):
    """The latents and text states of a latent diffusion teacher."""

    needs = frozenset({"latents", "prompts"})

    def __init__(self, teacher: LatentTeacher):
        self.teacher, self.shape = teacher, teacher.shape

    def samples(self, batch: Batch) -> Tensor:
        assert batch.latents is not None
        return self.teacher.latents(batch.latents, batch.draws)

    def condition(self, captions: Sequence[str]) -> Condition:
        return self.teacher.condition(captions)

    def decode(self, x0: Tensor) -> Tensor:
        return self.teacher.decode(x0)


class PixelSpace(Space):
    """Pixels in [-1, 1], three channels or, as the mean of them, one.

    classes  names in the order of the labels where the network is class-conditional, else empty
    """

    def __init__(self, shape: tuple[int, int, int], classes: Sequence[str] = ()):
        if shape[0] not in (1, 3):
            raise UserError(f"network: in_channels {shape[0]}: pixels have 3 channels, grey ones 1")
        self.shape, self.classes = shape, tuple(classes)
        self.needs = frozenset({"images", "labels"} if classes else {"images"})

    def samples(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        return batch.images if self.shape[0] == 3 else batch.images.mean(1, keepdim=True)

    def condition(self, captions: Sequence[str]) -> Condition:
        if not self.classes:
            return Condition({}, {})
        unknown = next((c for c in captions if c not in self.classes), None)
        if unknown is not None:
            raise UserError(f"{unknown!r} is none of the classes: {', '.join(self.classes)}")
        return Condition({"class_labels": torch.tensor([self.classes.index(c) for c in captions])}, {})

    def decode(self, x0: Tensor) -> Tensor:
        return x0.expand(-1, 3, -1, -1)


def latent_space(network: Any, teacher: LatentTeacher) -> LatentSpace:
    """Where a diffusers UNet2DConditionModel works. Raises UserError where it does not fit the teacher's latents."""
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"student.network: a {type(network).__name__} is told no prompts; latents need "
            "_class_name: UNet2DConditionModel"
        )
    ours, theirs = network.config, teacher.pipeline.unet.config
    for key in ("in_channels", "sample_size", "cross_attention_dim"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"student.network.{key}: {ours[key]}, but the teacher has {theirs[key]}; make them equal"
            )
    return LatentSpace(teacher)


def pixel_space(network: Any, parts: Parts) -> PixelSpace:
    """Where a diffusers UNet2DModel works. Raises UserError where the data or their size do not fit the network."""
    if not isinstance(network, UNet2DModel):
        raise UserError(
            f"student.network: a {type(network).__name__} does not work on pixels; leave _class_name out, or give a "
            "latent teacher"
        )
    config = network.config
    side = config.sample_size
    if side is not None and parts.resolution not in (None, side):
        raise UserError(
            f"resolution: {parts.resolution}, but the network's sample_size is {side}; make them equal"
        )
    count = config.num_class_embeds
    if count is not None and not parts.classes:
        raise UserError(
            f"data.name: the network tells {count} classes apart, the data name none; set num_class_embeds to null"
        )
    if count is not None and count < len(parts.classes):
        raise UserError(
            f"student.network.num_class_embeds: {count}, but the data have {len(parts.classes)} classes; raise it"
        )
    return PixelSpace((config.in_channels, side, side), parts.classes if count is not None else ())
