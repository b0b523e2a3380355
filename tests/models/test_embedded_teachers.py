"""The embedded teachers as they are shipped: size, code, and what they draw."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.models.teacher import LatentTeacher, PixelTeacher, Teacher
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.teachers import EMBEDDED
from fewstep.pipelines import pipeline_edm

MEGABYTES = {"emoji-sd": 16, "fashion-edm": 6}


@pytest.mark.parametrize("name", EMBEDDED)
def test_size_and_precision(name: str) -> None:
    files = [p for p in EMBEDDED[name].rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < MEGABYTES[name] * 1e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl")]


def test_they_are_found_by_name() -> None:
    kinds = {name: type(Teacher.load(TeacherSettings(name))) for name in EMBEDDED}
    assert kinds == {"emoji-sd": LatentTeacher, "fashion-edm": PixelTeacher}


def test_the_code_in_the_folder_is_ours() -> None:
    shipped = EMBEDDED["fashion-edm"] / "pipeline_edm.py"
    assert shipped.read_bytes() == Path(pipeline_edm.__file__).read_bytes()


def test_fashion_edm_draws_the_class_that_it_is_told() -> None:
    """Trousers are tall and narrow, sandals and sneakers wide and low: the lit rows and columns tell them apart."""
    pipe = DiffusionPipeline.from_pretrained(
        EMBEDDED["fashion-edm"], dtype=torch.float32, trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    labels = [1, 1, 1, 7, 7, 7]
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    pictures = pipe(len(labels), labels, 8, generator=generators, output_type="pt").images
    lit = pictures[:, 0] > 0.25
    height, width = lit.any(2).sum(1), lit.any(1).sum(1)
    assert (height[:3] > 22).all() and (width[:3] < 20).all()
    assert (height[3:] < 20).all() and (width[3:] > 22).all()
