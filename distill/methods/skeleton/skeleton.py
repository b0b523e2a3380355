"""One-step distillation of a teacher's own samples (Luhman and Luhman, arXiv 2101.02388), as a small example."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.export import Export
from ...diffusion.condition import Condition
from ...diffusion.consistency import ConsistencyFunction
from ...diffusion.generator import fresh_from, lcm_timesteps, seeded
from ...diffusion.guidance import guided_x0_eps
from ...diffusion.losses import distance
from ...diffusion.solvers import ddim_step
from ...errors import UserError
from ...models.stock_schedulers import lcm_scheduler
from ...models.student import Student
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal
from .settings import SkeletonSettings


class Skeleton(Method):
    """f(z, T - 1) is pulled to the sample that the guided teacher solves from the same noise z, for the same prompt.

    The gradient flows through the student's one call alone.
    """

    Settings = SkeletonSettings
    needs = frozenset({"prompts"})  # of the data; the noise is drawn here

    def __init__(self, settings: SkeletonSettings, parts: Parts):
        super().__init__(settings, parts)
        self.teacher = parts.need_latent_teacher()
        self.process = self.teacher.noise
        total, count = len(self.process.abar), settings.num_teacher_steps
        if count > total:
            raise UserError(f"method.num_teacher_steps: {count}, but the teacher has {total}; lower it")
        self.times = lcm_timesteps(count, total, total)
        self.student = Student(self.teacher.denoiser, parts.student)
        self.function = ConsistencyFunction(self.student.denoiser)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.condition is not None
        noise = batch.draws.normal(self.teacher.shape)
        target = self.solved(noise, batch.condition)
        prediction = self.one_step(noise, batch.condition)
        return {"loss": distance(self.settings.distance, prediction, target, self.settings.huber_c)}

    def one_step(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's x0 of pure noise (B, C, h, w)."""
        return self.function(noise, self.at(self.times[0], noise), condition)

    @torch.no_grad()
    def solved(self, noise: Tensor, condition: Condition) -> Tensor:
        """The frozen teacher's guided DDIM solution from the same noise; the last step ends at its x0."""
        z, scale = noise, torch.full((len(noise),), self.settings.guidance_scale, device=noise.device)
        with self.student.teacher_mode():  # a LoRA is switched off
            for t, s in pairwise([*self.times, None]):
                assert t is not None
                x0, eps = guided_x0_eps(self.teacher.denoiser, z, self.at(t, z), condition, scale)
                z = x0 if s is None else ddim_step(x0, eps, self.process, self.at(s, z))
        return z

    def at(self, time: int, x: Tensor) -> Tensor:
        """The same time for each row, (B,)."""
        return torch.full((len(x),), time, dtype=torch.float64, device=x.device)

    @torch.no_grad()
    def sample(self, captions: list[str], generators: list[torch.Generator]) -> Tensor:
        """Latents (B, C, h, w), one random generator per picture."""
        noise = torch.empty(len(captions), *self.teacher.shape, device=self.teacher.device)
        return self.one_step(fresh_from(generators)(noise), self.teacher.condition(captions))

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        latents = self.sample(captions, seeded(len(captions), seed))
        return {"1 step": self.teacher.decode(latents)}

    def rehearsal(
        self, captions: list[str], num_steps: int, generators: list[torch.Generator]
    ) -> Rehearsal | None:
        return Rehearsal(self.sample(captions, generators), {"prompt": captions})

    def export(self) -> Export:
        """The teacher's own pipeline class with diffusers' LCMScheduler; a LoRA also as a file."""
        scheduler = lcm_scheduler(self.process, self.student.denoiser.kind)
        calls = {"1": {"timesteps": self.times[:1], **self.teacher.family.unguided(), **self.teacher.call()}}
        if not self.student.lora:
            return Export(self.teacher.assembled(self.student.network, scheduler=scheduler), sampling=calls)
        fused = self.student.fused() if self.parts.student.export_fused else None
        pipeline = None if fused is None else self.teacher.assembled(fused, scheduler=scheduler)
        adapter = self.teacher.adapter(self.student.lora_weights(), scheduler)
        return Export(pipeline, sampling=calls, adapter=adapter)
