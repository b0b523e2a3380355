"""Latent consistency methods on the tiny pipeline; meanflow_reference.py can be imported."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.methods.latent_consistency.base import LatentConsistency
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.rg_lcd import RGLCD
from fewstep.distill.methods.latent_consistency.scott import SCott
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.scorers.rewards import Reward
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from torch import Tensor


def build(
    pipeline_folder: Path,
    kind: type[LatentConsistency],
    *,
    prediction: str = "epsilon",
    student: StudentSettings | None = None,
    shake: float = 0.0,
    parts: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    teacher = LatentTeacher(pipeline, str(pipeline_folder))
    given = Parts(teacher, student or StudentSettings(), [], **(parts or {}))
    torch.manual_seed(0)  # new layers start alike
    method = kind(kind.Settings(**{"guidance_dim": 16, **settings}), given)
    generator = torch.Generator().manual_seed(3)
    averages = [] if method.target is None else list(method.target.tensors().values())
    with torch.no_grad():
        for p in [*method.student.trained().values(), *averages]:
            p.add_(shake * torch.randn(p.shape, generator=generator))
    return method


sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def build_lcd(tiny_pipeline: Path) -> Callable[..., LCD]:
    """build_lcd(prediction=, student=, shake=, **settings of the method).

    With `shake`, student and target are moved away from the teacher and from each other by Gaussian noise of this size.
    """
    return partial(build, tiny_pipeline, LCD)


@pytest.fixture
def build_scott(tiny_pipeline: Path) -> Callable[..., SCott]:
    """As build_lcd; the discriminator's LoRA has rank 4 and, with `shake`, is moved too."""

    def with_discriminator(**settings: Any) -> SCott:
        method = build(tiny_pipeline, SCott, **{"discriminator_rank": 4, **settings})
        generator = torch.Generator().manual_seed(4)
        if settings.get("shake") and method.discriminator is not None:
            with torch.no_grad():
                for p in method.discriminator.up.values():
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))
        return method

    return with_discriminator


class Brightness(Reward):
    """Reward sum_i k_i mean(colour i); prefers bright pictures whatever the caption."""

    best = 1.0

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return (images.mean((2, 3)) * torch.tensor([0.5, 0.3, 0.2])).sum(1)

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        return 100 * self(images, captions)


@pytest.fixture
def build_rg_lcd(tiny_pipeline: Path) -> Callable[..., RGLCD]:
    """As build_lcd, with a given `reward` object in place of one found by name."""

    def with_reward(*, reward: Reward | None = None, **settings: Any) -> RGLCD:
        found = reward or Brightness()
        return build(tiny_pipeline, RGLCD, parts={"reward": lambda name: found}, **settings)

    return with_reward
