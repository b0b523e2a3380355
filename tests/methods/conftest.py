"""Latent consistency distillation methods on the tiny pipeline; meanflow_reference.py can be imported."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.config import StudentSettings
from fewstep.distill.methods.base import Parts
from fewstep.distill.methods.lcd import LCD, LCDSettings
from fewstep.distill.teacher import LatentTeacher

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def build_lcd(tiny_pipeline: Path) -> Callable[..., LCD]:
    """build_lcd(prediction=, student=, shake=, **settings of the method).

    With `shake`, student and target are moved away from the teacher and from each other by Gaussian noise of this size.
    """

    def build(
        *,
        prediction: str = "epsilon",
        student: StudentSettings | None = None,
        shake: float = 0.0,
        **settings: Any,
    ) -> LCD:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        pipeline.scheduler.register_to_config(prediction_type=prediction)
        parts = Parts(LatentTeacher(pipeline, str(tiny_pipeline)), student or StudentSettings(), [])
        method = LCD(LCDSettings(**{"guidance_dim": 16, **settings}), parts)
        generator = torch.Generator().manual_seed(3)
        averages = [] if method.target is None else list(method.target.tensors().values())
        with torch.no_grad():
            for p in [*method.student.trained().values(), *averages]:
                p.add_(shake * torch.randn(p.shape, generator=generator))
        return method

    return build
