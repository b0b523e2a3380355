"""Latent consistency distillation (LCM, arXiv 2310.04378; with a LoRA student LCM-LoRA, arXiv 2311.05556)."""

from functools import partial
from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from ...pipelines.export import Adapter, Export, in_float32
from ..condition import Condition
from ..config import settings
from ..consistency import ConsistencyFunction, lcm_boundary
from ..ema import EMA
from ..errors import UserError
from ..generator import Generator, fresh_from, lcm_timesteps, seeded
from ..guidance import guidance_embedding, guided_x0_eps
from ..losses import Distance, distance
from ..solvers import ddim_step
from ..student import Student
from .base import Batch, Method, Parts, Progress, Published

EXPORTED_STEPS = (1, 2, 3, 4, 6, 8)
TABLE = "LCM paper, guidance scale 8, SD 2.1; {}"
PUBLISHED = tuple(
    Published(f"LAION-Aesthetics {side} px", "FID", steps, value, TABLE.format(certainty))
    for side, values, certainty in (
        (768, (34.2, 16.3, 13.5), "values recalled, in agreement with the repository's speed_fid.png"),
        (512, (35.4, 13.3, 11.1), "values recalled, not checked"),
    )
    for steps, value in zip((1, 2, 4), values, strict=True)
)


@settings
class LCDSettings:
    """Guidance here is the paper's omega, w = guidance_scale - 1.

    w_min, w_max           omega is uniform on this range for each sample
    guidance_dim           width of the omega embedding of a full student
    num_ddim_timesteps     N: the teacher's steps are k = T/N long
    timestep_scaling       of the boundary condition
    distance, huber_c      between student and target
    target_decay           EMA of the target network (full); a LoRA's target is the student itself
    w_export               omega of the pictures and of sampling.json; must lie in the trained range
    sampling_power         sampling times of pictures and sampling.json, see `lcm_timesteps`; 1 is LCMScheduler's
    """

    w_min: float = Field(5.0, ge=0)
    w_max: float = Field(15.0, ge=0)
    guidance_dim: int = Field(256, ge=4)
    num_ddim_timesteps: int = Field(50, ge=1)
    timestep_scaling: float = 10.0
    distance: Distance = "huber"
    huber_c: float = Field(1e-3, gt=0)
    target_decay: float | None = Field(0.95, ge=0, lt=1)
    w_export: float = 7.5
    sampling_power: float = Field(1.0, ge=1, le=4)


class LCD(Method):
    """f(z_hi) is pulled to the target's f(z_lo), z_lo one guided DDIM step of k times closer to the data.

    The gradient flows through f(z_hi) alone: teacher step and target are computed without one.
    """

    Settings = LCDSettings
    needs = frozenset({"latents", "prompts"})
    published = PUBLISHED

    def __init__(self, settings: LCDSettings, parts: Parts):
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
        if self.total % s.num_ddim_timesteps:
            raise UserError(
                f"method.num_ddim_timesteps: {s.num_ddim_timesteps} does not divide the teacher's {self.total} steps"
            )
        self.skip = self.total // s.num_ddim_timesteps
        try:
            self.calls(1.0)
        except ValueError as error:
            raise UserError(f"method.sampling_power: {error}; lower it") from None
        lora = parts.student.kind == "lora"
        self.student = Student(
            self.teacher.denoiser, parts.student, guidance_dim=None if lora else s.guidance_dim
        )
        boundary = partial(lcm_boundary, timestep_scaling=s.timestep_scaling)
        self.function = ConsistencyFunction(self.student.denoiser, boundary)
        decay = None if lora else s.target_decay
        self.target = None if decay is None else EMA(self.student.trained(), decay)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.latents is not None and batch.condition is not None
        s, draws = self.settings, batch.draws
        z0 = self.teacher.latents(batch.latents, draws)
        index = draws.integers(0, s.num_ddim_timesteps)
        t_hi = ((index + 1) * self.skip - 1).double()
        t_lo = (t_hi - self.skip).clamp(min=0)
        w = draws.uniform(s.w_min, s.w_max)
        z_hi = self.process.noised(z0, draws.normal(z0.shape[1:]), t_hi)
        condition = self.embedded(batch.condition, w)

        prediction = self.function(z_hi, t_hi, condition)
        with torch.no_grad():  # the only gradient is that of f(z_hi)
            z_lo = self.teacher_step(z_hi, t_hi, t_lo, batch.condition, w)
            weights = None if self.target is None else self.target.tensors()
            target = self.function(z_lo, t_lo, condition, weights=weights)
        return {"loss": distance(s.distance, prediction, target, s.huber_c)}

    def teacher_step(self, z: Tensor, t_hi: Tensor, t_lo: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """One guided DDIM step of the frozen teacher."""
        with self.student.teacher_mode():
            x0, eps = guided_x0_eps(self.teacher.denoiser, z, t_hi, condition, 1 + w)
        return ddim_step(x0, eps, self.process, t_lo)

    def embedded(self, condition: Condition, w: Tensor) -> Condition:
        """The student's condition: a full student sees omega, a LoRA does not."""
        if self.student.lora:
            return condition
        return condition.with_(timestep_cond=guidance_embedding(w, self.settings.guidance_dim))

    def after(self, player: str) -> None:
        if self.target is not None:
            self.target.update()

    def generator(self, num_steps: int) -> Generator:
        return Generator(self.function, self.times(num_steps))

    def times(self, num_steps: int) -> list[int]:
        s = self.settings
        return lcm_timesteps(num_steps, s.num_ddim_timesteps, self.total, s.sampling_power)

    @torch.no_grad()
    def sample(
        self, captions: list[str], num_steps: int, w: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Latents (B, C, h, w) by multistep consistency sampling, one random generator per image."""
        condition = self.teacher.condition(captions)
        guidance = torch.full((len(captions),), w, device=self.teacher.vae.device)
        fresh = fresh_from(generators)
        device = self.teacher.vae.device
        noise = fresh(torch.empty(len(captions), *self.teacher.shape, device=device))
        return self.generator(num_steps)(noise, self.embedded(condition, guidance), fresh)

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        rows = {}
        for n in (1, 2, 4):
            z = self.sample(captions, n, self.settings.w_export, seeded(len(captions), seed))
            with torch.no_grad():
                rows[f"{n} steps"] = self.teacher.decode(z)
        return rows

    def export(self) -> Export:
        s = self.settings
        scheduler = LCMScheduler.from_config(
            self.teacher.pipeline.scheduler.config,
            timestep_scaling=s.timestep_scaling,
            original_inference_steps=s.num_ddim_timesteps,
            clip_sample=False,
            set_alpha_to_one=False,
        )
        components = self.teacher.pipeline.components
        parts = in_float32({k: v for k, v in components.items() if k != "unet"}) | {"scheduler": scheduler}
        if not self.student.lora:
            pipeline = LatentConsistencyModelPipeline(
                **{**parts, "unet": self.student.network}, requires_safety_checker=False
            )
            return Export(pipeline, sampling=self.calls(s.w_export + 1))
        calls = self.calls(1.0)
        pipeline = None
        if self.parts.student.export_fused:
            pipeline = StableDiffusionPipeline(
                **{**parts, "unet": self.student.fused()}, requires_safety_checker=False
            )
        adapter = Adapter(self.student.lora_weights(), scheduler)
        return Export(pipeline, sampling=calls, adapter=adapter)

    def calls(self, guidance_scale: float) -> dict[str, dict[str, Any]]:
        """sampling.json: the stock scheduler finds even times by itself, others are named."""
        s = self.settings
        out: dict[str, dict[str, Any]] = {}
        for n in EXPORTED_STEPS:
            if n <= s.num_ddim_timesteps:
                where = {"num_inference_steps": n} if s.sampling_power == 1 else {"timesteps": self.times(n)}
                out[str(n)] = {**where, "guidance_scale": guidance_scale}
        return out
