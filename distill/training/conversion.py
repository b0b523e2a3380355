"""The first steps of a run whose student predicts something else than its teacher: it learns the teacher's own output
in the new terms, before the method starts."""

from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Prediction
from ..diffusion.process import VP
from ..errors import UserError
from ..models.student import Student
from ..models.teacher import LatentTeacher
from .contract import Batch, Method, Progress


class Phases(nn.Module):
    """A method behind `conversion_steps` of conversion: `turns`, `progress` and the call are those of the phase that an
    iteration stands in. With 0 steps it is the method alone."""

    def __init__(self, method: Method, conversion_steps: int):
        super().__init__()
        self.method, self.steps = method, conversion_steps
        self.first = next(iter(method.players()))  # the one that is exported
        student, teacher = getattr(method, "student", None), method.parts.teacher
        if conversion_steps and not (isinstance(student, Student) and isinstance(teacher, LatentTeacher)):
            raise UserError(
                f"student.conversion_steps: {conversion_steps}: this teacher's samples are no latents; leave "
                "student.prediction and student.conversion_steps out"
            )

    def converting(self, iteration: int) -> bool:
        return iteration < self.steps

    def turns(self, progress: Progress) -> tuple[str, ...]:
        if self.converting(progress.iteration):
            return (self.first,)
        return self.method.turns(self.progress(progress))

    def progress(self, progress: Progress) -> Progress:
        """As the method sees it: its own iterations and updates alone."""
        updates = {**progress.updates}
        updates[self.first] -= self.steps
        return Progress(progress.iteration - self.steps, progress.total - self.steps, updates)

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        if not self.steps:
            return self.method(player, batch, progress, carry)
        if not self.converting(progress.iteration):
            return self.method(player, batch, self.progress(progress), carry)
        student = self.method.student
        assert isinstance(student, Student)
        loss = conversion_loss(student, self.method.parts.need_latent_teacher(), batch)
        return {"loss": loss, "conversion_loss": loss.detach()}


def conversion_loss(student: Student, teacher: LatentTeacher, batch: Batch) -> Tensor:
    """Mean square of the student's output against the unguided teacher's in the student's terms, at a uniform time of
    the teacher's process; 0 for a network that is the teacher's in other words.

    The state is data and noise of the batch. v = alpha eps - sigma x0 (arXiv 2202.00512, appendix D).
    """
    assert batch.latents is not None and batch.condition is not None
    process, draws = teacher.noise, batch.draws
    assert isinstance(process, VP)
    z0 = teacher.latents(batch.latents, draws)
    t = draws.integers(0, len(process.abar)).double()
    x_t = process.noised(z0, draws.normal(z0.shape[1:]), t)
    with torch.no_grad():
        target = in_terms(teacher.denoiser(x_t, t, batch.condition), student.denoiser.kind)
    return (student.denoiser(x_t, t, batch.condition).output - target).square().mean()


def in_terms(seen: Prediction, kind: str) -> Tensor:
    """A prediction as a network of that kind would give it."""
    return {"epsilon": seen.eps, "v_prediction": seen.v, "sample": seen.x0}[kind]
