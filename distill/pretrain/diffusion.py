"""Trains a diffusion model on data: denoising in latents with classifier-free guidance dropout."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ...pipelines.export import Export, in_float32
from ..diffusion.generator import ddim_sample, ends_at_data, seeded
from ..diffusion.process import per_sample
from ..models.student import Student
from ..training.contract import Batch, Method, Parts, Progress
from .settings import DiffusionSettings


class Diffusion(Method):
    """E |eps_hat(alpha x0 + sigma eps, t, c) - eps|^2 (arXiv 2006.11239, eq. 14), t uniform on the training steps."""

    Settings = DiffusionSettings
    needs = frozenset({"latents", "prompts"})

    def __init__(self, settings: DiffusionSettings, parts: Parts):
        super().__init__(settings, parts)
        self.teacher = parts.need_latent_teacher()
        self.student = Student(self.teacher.denoiser, parts.student)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.latents is not None and batch.condition is not None
        process = self.teacher.process
        x0 = self.teacher.latents(batch.latents, batch.draws)
        t = batch.draws.integers(0, int(process.t_range[1]) + 1).double()
        eps = batch.draws.normal(x0.shape[1:])
        condition = batch.condition.drop(batch.draws.uniform() < self.settings.caption_dropout)
        x_t = process.noised(x0, eps, t)
        error = (self.student.denoiser(x_t, t, condition).eps - eps).square()
        if self.settings.snr_gamma is not None:
            snr = process.log_snr(t).exp()
            error = error * per_sample(snr.clamp(max=self.settings.snr_gamma) / snr, error)
        return {"loss": error.mean()}

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        condition = self.teacher.condition(captions)
        generators = seeded(len(captions), seed)
        z = ddim_sample(
            self.student.denoiser,
            self.teacher.shape,
            condition,
            20,
            self.settings.guidance_scale,
            generators,
            to_data=ends_at_data(self.teacher.pipeline.scheduler),
        )
        return {"20 steps": self.teacher.decode(z)}

    def export(self) -> Export:
        sampling = {"default": {"guidance_scale": self.settings.guidance_scale}}
        adapter, network = None, self.student.network
        if self.student.lora:
            adapter = self.teacher.adapter(self.student.lora_weights(), self.teacher.pipeline.scheduler)
            if not self.parts.student.export_fused:
                return Export(None, sampling=sampling, adapter=adapter)
            network = self.student.fused()
        parts = in_float32({k: v for k, v in self.teacher.pipeline.components.items() if k != "unet"})
        pipeline = StableDiffusionPipeline(**parts, unet=network, requires_safety_checker=False)
        return Export(pipeline, sampling=sampling, adapter=adapter)
