"""The skeleton: a loss of zero where there is nothing to learn, a constant target, an export that draws alike."""

from pathlib import Path

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.skeleton.settings import SkeletonSettings
from fewstep.distill.methods.skeleton.skeleton import Skeleton
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor

CAPTIONS = ["red cat", "dog"]
KINDS = [StudentSettings(), StudentSettings(kind="lora", rank=4, lora_alpha=8)]
START = Progress(0, 2, {"student": 0})


def built(folder: Path, student: StudentSettings, *, shake: float = 0.0, **settings: float) -> Skeleton:
    """The method on a tiny pipeline, its student moved away from the teacher by Gaussian noise of size `shake`."""
    teacher = Teacher.load(TeacherSettings(str(folder)))
    torch.manual_seed(0)  # new layers start alike
    method = Skeleton(SkeletonSettings(**settings), Parts(teacher, student, CAPTIONS))
    with torch.no_grad():
        for p in method.student.trained().values():
            p.add_(shake * torch.randn_like(p))
    return method


def loss(method: Skeleton) -> Tensor:
    assert isinstance(method.teacher, LatentTeacher)
    batch = Batch(Draws(0, 0, range(2)), condition=method.teacher.condition(CAPTIONS))
    return method("student", batch, START, {})["loss"]


@pytest.mark.parametrize("student", KINDS, ids=["full", "lora"])
def test_the_loss_vanishes_where_the_student_has_nothing_to_learn(
    student: StudentSettings, tiny_pipeline: Path
) -> None:
    """One unguided step of the teacher is what a student that starts from it draws; more steps and guidance are not."""
    assert loss(built(tiny_pipeline, student, num_teacher_steps=1, guidance_scale=1.0)) < 1e-9
    assert loss(built(tiny_pipeline, student, num_teacher_steps=2, guidance_scale=1.0)) > 1e-3
    assert loss(built(tiny_pipeline, student, num_teacher_steps=1, guidance_scale=3.0)) > 1e-3


@pytest.mark.parametrize("student", KINDS, ids=["full", "lora"])
def test_the_gradient_is_that_of_a_constant_target(student: StudentSettings, tiny_pipeline: Path) -> None:
    """The teacher's solution is computed apart, before and without a LoRA, and held fixed."""
    method = built(tiny_pipeline, student, shake=0.05)
    condition, draws = method.teacher.condition(CAPTIONS), Draws(0, 0, range(2))
    noise = draws.normal(method.teacher.shape)
    target = built(tiny_pipeline, KINDS[0]).solved(noise, condition)
    parameters = method.players()["student"]
    wanted = torch.autograd.grad((method.one_step(noise, condition) - target).square().mean(), parameters)
    found = torch.autograd.grad(loss(method), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("student", KINDS, ids=["full", "lora"])
def test_the_exported_pipeline_draws_what_the_method_draws(
    student: StudentSettings, tiny_pipeline: Path
) -> None:
    method = built(tiny_pipeline, student, shake=0.05)
    own = method.sample(CAPTIONS, [torch.Generator().manual_seed(i) for i in range(2)])
    export = method.export()
    export.model.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = export.model(CAPTIONS, **export.sampling["1"], generator=generators, output_type="latent").images
    torch.testing.assert_close(drawn, own, rtol=1e-4, atol=1e-4)
