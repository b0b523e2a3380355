"""Data that the teacher makes: prompts, and latents of its own sampler in place of an autoencoder's."""

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ...pipelines.export import sampling_of
from ..config.run import DataSettings
from ..data.images import ImageData
from ..data.prompts import read_prompts
from ..data.sources import load_data
from ..diffusion.draws import mix
from ..errors import UserError
from ..models.frozen import content_hash, without_adapter
from ..models.teacher import LatentTeacher, Teacher, locate

NAME = "teacher"
STEPS = 50
OWN_KEYS = ("prompts", "num_inference_steps", "guidance_scale", "images_per_prompt", "seed")

Texts = Callable[[Sequence[str]], dict[str, Tensor]]


def open_data(settings: DataSettings, teacher: Teacher | None, resolution: int) -> ImageData:
    """The training data that `data:` names. Raises UserError for keys that have no effect on it."""
    check_keys(settings)
    if settings.name == NAME:
        return TeacherData(settings, teacher, resolution)
    return load_data(
        settings.name, split=settings.split, resolution=resolution, center_crop=settings.center_crop,
        image_column=settings.image_column, caption_column=settings.caption_column,
    )  # fmt: skip


def check_keys(settings: DataSettings) -> None:
    given = [k for k in OWN_KEYS if getattr(settings, k) is not None]
    if settings.name != NAME and given:
        raise UserError(f"data.{given[0]}: no effect on {settings.name}; set data.name to {NAME}")


class TeacherData(ImageData):
    """Each prompt `images_per_prompt` times: captions without pictures, whose latents `make` gives.

    Raises UserError without prompts, or for a teacher that takes none.
    """

    def __init__(self, settings: DataSettings, teacher: Teacher | None, resolution: int):
        if not isinstance(teacher, LatentTeacher):
            raise UserError(f"data.name: {NAME}: needs a latent teacher that takes prompts; give pictures")
        captions = captions_of(settings)
        super().__init__(captions, [{}] * len(captions), resolution, center_crop=False, name=NAME)
        self.teacher, self.seed = teacher, settings.seed or 0
        self.num_inference_steps = settings.num_inference_steps or STEPS
        scale = settings.guidance_scale
        self.guidance_scale = (
            own_guidance(teacher.path, type(teacher.pipeline).__name__) if scale is None else scale
        )
        self.weights = content_hash(teacher.family.network)  # now, while no adapter is on it

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        raise UserError(f"data.name: {NAME}: there are latents alone, and this method trains on pictures")

    def hash_content(self, digest: Any) -> None:
        config = self.teacher.pipeline.scheduler.config
        scheduler = sorted((k, v) for k, v in config.items() if not k.startswith("_"))
        recipe = (self.num_inference_steps, self.guidance_scale, self.seed, self.weights)
        digest.update(repr((recipe, type(self.teacher.pipeline.scheduler).__name__, scheduler)).encode())

    def make(self, start: int, stop: int, texts: Texts) -> Tensor:
        """Latents (stop - start, C, h, w) of the rows in the autoencoder's units, by the teacher's own pipeline.

        texts: encoded captions, as `LatentTeacher.encode_prompts`. Row i has a random generator of its own, so that
        its noise is that of any other batch. Raises UserError for what is not finite.
        """
        family = self.teacher.family
        told = family.call_texts(texts(self.captions[start:stop]))
        empty = family.call_texts(
            {k: v.expand(stop - start, *v.shape[1:]) for k, v in self.teacher.encode_empty().items()}
        )
        pipeline = self.teacher.sampler()
        takes = signature(type(pipeline).__call__).parameters
        negative = {f"negative_{k}": v for k, v in empty.items() if f"negative_{k}" in takes}
        with without_adapter(family.network):
            out = pipeline(
                **{k: v.to(self.teacher.device) for k, v in (told | negative).items()},
                **family.call(self.resolution),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=[torch.Generator().manual_seed(mix(self.seed, i)) for i in range(start, stop)],
                output_type="latent",
                return_dict=False,
            )[0]
        latents = self.teacher.unscaled(family.unpacked(out, self.resolution).float())
        if not latents.isfinite().all():
            raise UserError(
                f"data.name: {NAME}: latents of prompts {start} to {stop - 1} are not finite; set mixed_precision to "
                "bf16 or no"
            )
        return latents


def captions_of(settings: DataSettings) -> list[str]:
    """The prompts, each as often as it gets a picture."""
    if settings.prompts is None:
        raise UserError(f"data.prompts: missing; data {NAME} needs a text file with one prompt a line")
    return [p for p in read_prompts(settings.prompts) for _ in range(settings.images_per_prompt or 1)]


def own_guidance(path: str, kind: str) -> float:
    """The guidance scale that a teacher's folder names for any number of steps, else its pipeline class's default."""
    default = signature(getattr(diffusers, kind).__call__).parameters["guidance_scale"].default
    said = sampling_of(Path(locate(path))).get("default", {})
    return float(said.get("guidance_scale", default))
