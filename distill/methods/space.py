"""Where a method works: the samples that it denoises, what the network is told, what a student starts from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..diffusion.condition import Condition
from ..diffusion.denoiser import Denoiser
from ..diffusion.process import EDM, NoiseProcess
from ..errors import UserError
from ..models.codec import Codec
from ..models.families.unets import StableDiffusion
from ..models.student import new_denoiser, renewed
from ..models.teacher import LatentTeacher
from ..training.contract import Batch, Parts


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

    def inputs(self, captions: Sequence[str]) -> dict[str, Any]:
        """The arguments by which a pipeline's call is told these captions."""
        labels = self.condition(captions).arguments.get("class_labels")
        return {"batch_size": len(captions), **({} if labels is None else {"class_labels": labels})}

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

    def inputs(self, captions: Sequence[str]) -> dict[str, Any]:
        return {"prompt": list(captions)}

    def decode(self, x0: Tensor) -> Tensor:
        return self.teacher.decode(x0)


class ClassLatentSpace(Space):
    """The latents of an autoencoder, with class labels or nothing told beside them.

    classes     names in the order of the labels where the network is class-conditional, else empty
    null_label  what the network is told in place of a label to say none
    """

    def __init__(self, codec: Codec, shape: tuple[int, int, int], classes: Sequence[str], null_label: int):
        self.codec, self.shape = codec, shape
        self.classes, self.null_label = tuple(classes), null_label
        self.needs = frozenset({"latents", "labels"} if classes else {"latents"})

    def samples(self, batch: Batch) -> Tensor:
        assert batch.latents is not None
        return self.codec.latents(batch.latents, batch.draws)

    def condition(self, captions: Sequence[str]) -> Condition:
        return self._with_null(labels_of(captions, self.classes))

    def told(self, batch: Batch) -> Condition:
        return self._with_null(super().told(batch))

    def decode(self, x0: Tensor) -> Tensor:
        return self.codec.decode(x0)

    def _with_null(self, condition: Condition) -> Condition:
        labels = condition.arguments.get("class_labels")
        if labels is None:
            return condition
        return Condition(condition.arguments, {"class_labels": torch.full_like(labels[:1], self.null_label)})


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
        return labels_of(captions, self.classes)

    def decode(self, x0: Tensor) -> Tensor:
        return x0.expand(-1, 3, -1, -1)


def latent_space(network: Any, teacher: LatentTeacher) -> LatentSpace:
    """Where a diffusers UNet2DConditionModel works, for methods whose own pipelines take one text encoder's states.

    Raises UserError for other teachers and where it does not fit the teacher's latents.
    """
    if type(teacher.family) is not StableDiffusion:
        raise UserError(
            f"teacher.path: {teacher.path} is a {type(teacher.pipeline).__name__}; this method's exported pipeline "
            "knows one text encoder and a U-Net: use a StableDiffusionPipeline"
        )
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"student.network: a {type(network).__name__} is told no prompts; latents need "
            "_class_name: UNet2DConditionModel"
        )
    ours, theirs = network.config, teacher.family.network.config
    for key in ("in_channels", "sample_size", "cross_attention_dim"):
        if ours[key] != theirs[key]:
            raise UserError(
                f"student.network.{key}: {ours[key]}, but the teacher has {theirs[key]}; make them equal"
            )
    return LatentSpace(teacher)


def labels_of(captions: Sequence[str], classes: Sequence[str]) -> Condition:
    """Class names as labels; nothing where there are no classes."""
    if not classes:
        return Condition({}, {})
    unknown = next((c for c in captions if c not in classes), None)
    if unknown is not None:
        raise UserError(f"{unknown!r} is none of the classes: {', '.join(classes)}")
    return Condition({"class_labels": torch.tensor([classes.index(c) for c in captions])}, {})


def space_of(network: Any, parts: Parts) -> Space:
    """Where a network works: a latent teacher's texts and latents if it takes texts, else latents with classes where
    there is an autoencoder, else pixels."""
    if isinstance(network, UNet2DConditionModel):
        return latent_space(network, parts.need_latent_teacher())
    codec = parts.codec
    if codec is None:
        return pixel_space(network, parts)
    assert parts.resolution is not None
    shape, config = codec.latent_shape(parts.resolution), network.config
    if (config.in_channels, config.sample_size) != shape[:2]:
        raise UserError(
            f"student.network: in_channels {config.in_channels}, sample_size {config.sample_size}, but the latents of "
            f"{parts.resolution} px are {shape[0]} x {shape[1]} x {shape[2]}; make them equal"
        )
    if codec.units() != Codec.units(codec):
        raise UserError(
            f"teacher.path: {codec.path}: its pipeline scales latents by another rule than shift_factor and "
            "scaling_factor, which are all that this method's exported pipeline knows; use another teacher"
        )
    count = fitting_classes(config.num_class_embeds, parts.classes)
    return ClassLatentSpace(codec, shape, parts.classes if count else (), count)


def fitting_classes(count: int | None, classes: Sequence[str]) -> int:
    """How many classes a network tells apart, 0 for none. UserError where the data have others."""
    if count is not None and not classes:
        raise UserError(
            f"data.name: the network tells {count} classes apart, the data name none; set num_class_embeds to null"
        )
    if count is not None and count < len(classes):
        raise UserError(
            f"student.network.num_class_embeds: {count}, but the data have {len(classes)} classes; raise it"
        )
    return count or 0


def pixel_space(network: Any, parts: Parts) -> PixelSpace:
    """Where a network without texts works. Raises UserError where the data or their size do not fit it."""
    if isinstance(network, UNet2DConditionModel):
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
    count = fitting_classes(config.num_class_embeds, parts.classes)
    return PixelSpace((config.in_channels, side, side), parts.classes if count else ())


def start_of(parts: Parts, process: NoiseProcess, kind: str) -> Denoiser:
    """What a student starts from: the teacher as it is, or new weights that work in `process` and give `kind`.

    Raises UserError for settings that contradict each other, and where the teacher's sigma_data is not the process's.
    """
    student, teacher = parts.student, parts.teacher
    if student.init == "teacher":
        if student.network is not None:
            raise UserError(
                "student.network: has no effect beside init: teacher; set student.init to scratch"
            )
        base = parts.need_teacher().denoiser
        wanted = getattr(process, "sigma_data", None)
        if isinstance(base.process, EDM) and wanted not in (None, base.process.sigma_data):
            raise UserError(
                f"method.sigma_data: {wanted}, but the teacher's network was made for "
                f"{base.process.sigma_data}; make them equal"
            )
        return base
    if student.prediction is not None:
        raise UserError("student.prediction: new weights give what the method asks for; leave the key out")
    if student.kind == "lora":
        raise UserError("student.init: scratch: a LoRA needs the teacher's weights; set it to teacher")
    if student.network is not None:
        return new_denoiser(student.network, process, kind, student.norm)
    if teacher is None:
        raise UserError("student.network: missing; without a teacher the architecture must be given")
    return renewed(teacher.denoiser, process, kind, student.norm)
