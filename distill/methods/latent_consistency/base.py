"""What latent consistency methods share: the step from data to prediction and target, sampling and export."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.export import Export
from ...diffusion.condition import Condition
from ...diffusion.consistency import ConsistencyFunction, lcm_boundary
from ...diffusion.draws import Draws
from ...diffusion.ema import EMA
from ...diffusion.generator import Generator, chosen_times, fresh_from, lcm_timesteps, seeded
from ...diffusion.guidance import guidance_embedding, guided_x0_eps
from ...diffusion.losses import distance
from ...errors import UserError
from ...models.stock_schedulers import lcm_scheduler
from ...models.student import Student
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal

EXPORTED_STEPS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Step:
    """The tensors of a training step, (B, ...): the clean latent and its noise, time and omega of each sample, the
    prompts without and with omega's embedding, the student's prediction (the one with a graph) and its target."""

    z0: Tensor
    eps: Tensor
    t_hi: Tensor
    w: Tensor
    prompts: Condition
    condition: Condition
    prediction: Tensor
    target: Tensor


class LatentConsistency(Method):
    """f(z_hi) is pulled to the target's f(z_lo), z_lo a guided solution of the teacher closer to the data.

    The gradient flows through f(z_hi) alone: teacher and target are computed without one. Subclasses say which times
    there are and how the teacher solves.
    """

    needs = frozenset({"latents", "prompts"})

    def __init__(self, settings: Any, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        if s.w_min > s.w_max:
            raise UserError(f"method.w_min: {s.w_min} is above method.w_max {s.w_max}; swap them")
        if not s.w_min <= s.w_export <= s.w_max:
            raise UserError(
                f"method.w_export: {s.w_export} is outside the trained range {s.w_min}..{s.w_max}"
            )
        self.teacher = parts.need_latent_teacher()
        self.process = self.teacher.noise
        self.total = len(self.process.abar)
        self.grid = self.sampling_grid()
        try:
            self.calls(1.0)
        except ValueError as error:
            raise UserError(f"method.sampling_power: {error}; lower it") from None
        lora = parts.student.kind == "lora"
        width = self.teacher.family.network.config.time_cond_proj_dim
        if not lora and width not in (None, s.guidance_dim):
            raise UserError(
                f"method.guidance_dim: {s.guidance_dim}, but the teacher's network embeds the guidance scale in "
                f"{width} numbers; set it to {width}"
            )
        self.student = Student(
            self.teacher.denoiser, parts.student, guidance_dim=None if lora else s.guidance_dim
        )
        boundary = partial(lcm_boundary, timestep_scaling=s.timestep_scaling)
        self.function = ConsistencyFunction(self.student.denoiser, boundary)
        decay = None if lora else s.target_decay
        self.target = None if decay is None else EMA(self.student.trained(), decay)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    @abstractmethod
    def sampling_grid(self) -> list[int]:
        """Increasing times, T - 1 the last, among which those of sampling are."""

    @abstractmethod
    def training_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """t_hi > t_lo (B,) of a step."""

    @abstractmethod
    def teacher_step(
        self, z: Tensor, t_hi: Tensor, t_lo: Tensor, condition: Condition, w: Tensor, draws: Draws
    ) -> Tensor:
        """The frozen teacher's guided solution at t_lo of the state z at t_hi."""

    def step(self, batch: Batch) -> Step:
        assert batch.latents is not None and batch.condition is not None
        draws, s = batch.draws, self.settings
        z0 = self.teacher.latents(batch.latents, draws)
        t_hi, t_lo = self.training_times(draws)
        w = draws.uniform(s.w_min, s.w_max)
        eps = draws.normal(z0.shape[1:])
        z_hi = self.process.noised(z0, eps, t_hi)
        condition = self.embedded(batch.condition, w)

        prediction = self.function(z_hi, t_hi, condition)
        with torch.no_grad():  # the only gradient is that of f(z_hi)
            z_lo = self.teacher_step(z_hi, t_hi, t_lo, batch.condition, w, draws)
            weights = None if self.target is None else self.target.tensors()
            target = self.function(z_lo, t_lo, condition, weights=weights)
        return Step(z0, eps, t_hi, w, batch.condition, condition, prediction, target)

    def distance(self, step: Step) -> Tensor:
        return distance(self.settings.distance, step.prediction, step.target, self.settings.huber_c)

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        return {"loss": self.distance(self.step(batch))}

    def guide(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps of the frozen, guided teacher."""
        with self.student.teacher_mode():
            return guided_x0_eps(self.teacher.denoiser, z, t, condition, 1 + w)

    def embedded(self, condition: Condition, w: Tensor) -> Condition:
        """The student's condition: a full student sees omega, a LoRA does not."""
        if self.student.lora:
            return condition
        return condition.with_(timestep_cond=guidance_embedding(w, self.settings.guidance_dim))

    def after(self, player: str) -> None:
        if player == "student" and self.target is not None:
            self.target.update()

    def generator(self, num_steps: int) -> Generator:
        return Generator(self.function, self.times(num_steps))

    def times(self, num_steps: int) -> list[int]:
        return chosen_times(self.grid, num_steps, self.settings.sampling_power)

    @torch.no_grad()
    def sample(
        self, captions: list[str], num_steps: int, w: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Latents (B, C, h, w) by multistep consistency sampling, one random generator per image."""
        condition = self.teacher.condition(captions)
        device = self.teacher.device
        guidance = torch.full((len(captions),), w, device=device)
        fresh = fresh_from(generators)
        noise = fresh(torch.empty(len(captions), *self.teacher.shape, device=device))
        return self.generator(num_steps)(noise, self.embedded(condition, guidance), fresh)

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        rows = {}
        for n in (1, 2, 4):
            z = self.sample(captions, n, self.settings.w_export, seeded(len(captions), seed))
            with torch.no_grad():
                rows[f"{n} steps"] = self.teacher.decode(z)
        return rows

    def rehearsal(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Rehearsal:
        x0 = self.sample(captions, num_steps, self.settings.w_export, generators)
        return Rehearsal(x0, {"prompt": captions})

    def export(self) -> Export:
        s = self.settings
        scheduler = lcm_scheduler(
            self.process,
            self.student.denoiser.kind,
            timestep_scaling=s.timestep_scaling,
            original_inference_steps=len(self.grid),
        )
        assembled = partial(self.teacher.assembled, scheduler=scheduler)
        if not self.student.lora:
            pipeline = assembled(self.student.network, self.teacher.family.embedded_class)
            return Export(pipeline, sampling=self.calls(s.w_export + 1))
        pipeline = assembled(self.student.fused()) if self.parts.student.export_fused else None
        adapter = self.teacher.adapter(self.student.lora_weights(), scheduler)
        own = self.teacher.family.unguided()["guidance_scale"]
        return Export(pipeline, sampling=self.calls(own), adapter=adapter)

    def calls(self, guidance_scale: float) -> dict[str, dict[str, Any]]:
        """sampling.json: the stock scheduler finds LCM's even times by itself, others are named."""
        total, power = len(self.grid), self.settings.sampling_power
        stock = power == 1 and self.grid[::-1] == lcm_timesteps(total, total, self.total)
        out: dict[str, dict[str, Any]] = {}
        for n in EXPORTED_STEPS:
            if n <= total:
                where = {"num_inference_steps": n} if stock else {"timesteps": self.times(n)}
                out[str(n)] = {**where, "guidance_scale": guidance_scale, **self.teacher.call()}
        return out
