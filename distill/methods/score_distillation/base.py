"""What rCM and DMD2 share: a student in TrigFlow, its rollouts, fake score and guided teacher, sampling, export."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.export import Export
from ...diffusion.condition import Condition
from ...diffusion.consistency import ConsistencyFunction, no_boundary
from ...diffusion.denoiser import Denoiser, reach, seen_in
from ...diffusion.draws import Draws
from ...diffusion.generator import Generator, fresh_from, seeded
from ...diffusion.guidance import guided_x0_eps
from ...diffusion.process import TrigFlow, per_sample
from ...errors import UserError
from ...models.student import Student
from ...models.teacher import LatentTeacher
from ...training.contract import Method, Parts, Rehearsal
from ..space import LatentSpace, Space, space_of, start_of
from .score import FakeScore
from .trig_sampling import TrigSampling

Views = tuple[Tensor, Tensor]  # x0 and eps


class ScoreDistillation(Method):
    """Player `student`, and `fake_score`, which learns the student's own samples, where `scored`.

    The gradient of the student reaches the last step of its rollout alone. States are float64 until the network; times
    are cut to what student and teacher were trained on.
    """

    def __init__(self, settings: Any, parts: Parts, *, sigma_data: float, taught: bool, scored: bool):
        super().__init__(settings, parts)
        self.process = TrigFlow(sigma_data)
        self.taught, self.scored = taught or scored, scored
        if self.taught:
            parts.need_teacher()
        self.student = Student(start_of(parts, self.process, "trigflow"), parts.student)
        self.denoiser = seen_in(self.student.denoiser, self.process)
        self.function = ConsistencyFunction(self.denoiser, no_boundary)
        teacher = parts.teacher
        if parts.student.init == "teacher" and isinstance(teacher, LatentTeacher):
            self.space: Space = LatentSpace(teacher)
        else:
            self.space = space_of(self.student.network, parts)
        if isinstance(self.space, LatentSpace) and self.student.denoiser.process is self.process:
            raise UserError(
                "student.init: scratch: no stock pipeline samples a text network of TrigFlow; set it to teacher"
            )
        self.needs = self.space.needs
        ends = [reach(d) for d in (self.denoiser, *([self.source] if self.taught else []))]
        self.start_time = min(
            high for _, high in ends
        )  # pi/2, or the largest time of a network that ends before
        inset = 1e-6  # at an end itself the map of times has no derivative
        self.within = max(low for low, _ in ends) + inset, self.start_time - inset
        self.sampling = TrigSampling(self.denoiser, self.sampling_times())
        self.fake_score = FakeScore(parts.need_teacher().denoiser, self.student) if scored else None

    @cached_property
    def source(self) -> Denoiser:
        """The frozen teacher in TrigFlow; no submodule, so that it stays in evaluation mode."""
        return seen_in(self.parts.need_teacher().denoiser, self.process)

    def players(self) -> dict[str, list[nn.Parameter]]:
        fake = {} if self.fake_score is None else {"fake_score": list(self.fake_score.parameters())}
        return {"student": list(self.student.trained().values()), **fake}

    def optimiser(self, player: str) -> dict[str, Any]:
        lr = self.settings.fake_score_lr
        return {} if player == "student" or lr is None else {"lr": lr}

    @abstractmethod
    def rollout_times(self, draws: Draws, num_steps: int) -> list[Tensor]:
        """Times of a rollout of num_steps steps, (B,) each, from start_time and none above the one before."""

    def rollout(self, draws: Draws, told: Condition, num_steps: int) -> Tensor:
        """The student's samples x0 (B, C, H, W) after num_steps steps."""
        noise = self.sampling.start(draws.normal(self.space.shape).double(), self.start_time)
        times = self.rollout_times(draws, num_steps)
        generator = Generator(self.function, times, grad_steps="last")
        return generator(noise, told, lambda x: draws.normal(x.shape[1:]).double())

    @abstractmethod
    def sampling_times(self) -> list[float]:
        """Decreasing TrigFlow times of the pictures and the export, before they are rounded for its scheduler."""

    def guided(self, x: Tensor, t: Tensor, told: Condition) -> Views:
        """x0 and eps of the frozen teacher, guided."""
        g = self.settings.guidance_scale
        with torch.no_grad(), self.student.teacher_mode():
            if g == 1:
                seen = self.source(x, t, told)
                return seen.x0, seen.eps
            return guided_x0_eps(self.source, x, t, told, torch.full_like(t, g))

    def velocity(self, t: Tensor, views: Views) -> Tensor:
        """dx_t/dt of data and noise, (B, ...)."""
        x0, eps = views
        return (
            per_sample(self.process.alpha_dot(t), x0) * x0 + per_sample(self.process.sigma_dot(t), eps) * eps
        )

    def noised(self, x0: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The state at t and its new noise."""
        eps = draws.normal(x0.shape[1:]).double()
        return self.process.noised(x0, eps, t), eps

    def scores(self, sample: Tensor, t: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 of the fake score, unguided, and of the teacher, guided, for the renoised sample; without a gradient."""
        assert self.fake_score is not None
        with torch.no_grad():
            x, _ = self.noised(sample.detach(), t, draws)
            return self.fake_score(self.process, x, t, told).x0, self.guided(x, t, told)[0]

    @torch.no_grad()
    def sample(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Tensor:
        """x0 (B, C, H, W) in the first num_steps of the sampling times, one random generator per picture."""
        device = next(self.student.parameters()).device
        fresh = fresh_from(generators)
        noise = fresh(torch.empty(len(captions), *self.space.shape, device=device))
        told = self.space.condition(captions).to(device)
        times = self.sampling.times[:num_steps]
        return Generator(self.function, times)(self.sampling.start(noise, times[0]), told, fresh)

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        rows = {}
        for n in (k for k in (1, 2, 4) if k <= len(self.sampling.times)):
            x0 = self.sample(captions, n, seeded(len(captions), seed))
            with torch.no_grad():
                rows[f"{n} steps"] = self.space.decode(x0)
        return rows

    def rehearsal(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Rehearsal:
        return Rehearsal(self.sample(captions, num_steps, generators), self.space.inputs(captions))

    def export(self) -> Export:
        return self.sampling.export(self.student, self.space, self.parts.student)
