"""Trains a pixel teacher from data: EDM (arXiv 2206.00364), class-conditional where the network is."""

from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler
from torch import Tensor, nn

from ...pipelines.export import Export
from ...pipelines.pipeline_edm import EDMPipeline
from ..diffusion.generator import seeded
from ..diffusion.process import EDM, per_sample
from ..errors import UserError
from ..methods.space import pixel_space
from ..models.student import Student, new_denoiser
from ..training.contract import Batch, Method, Parts, Progress
from .settings import EDMSettings


class EDMTraining(Method):
    """E (sigma^2 + sd^2) / (sigma sd)^2 |D(x0 + sigma eps, sigma) - x0|^2 (eq. 2 with table 1's weight)."""

    Settings = EDMSettings

    def __init__(self, settings: EDMSettings, parts: Parts):
        super().__init__(settings, parts)
        s, student = settings, parts.student
        if student.network is None:
            raise UserError("student.network: missing; give the arguments of a UNet2DModel")
        if student.kind == "lora":
            raise UserError("student.kind: lora: this method trains new weights; set it to full")
        self.process = EDM(s.sigma_min, s.sigma_max, s.sigma_data, s.rho)
        self.student = Student(new_denoiser(student.network, self.process, "edm", student.norm), student)
        self.space = pixel_space(self.student.network, parts)
        self.needs = self.space.needs

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        s, draws = self.settings, batch.draws
        x0 = self.space.samples(batch)
        sigma = (s.p_mean + s.p_std * draws.normal(()).double()).exp()
        x_t = self.process.noised(x0, draws.normal(x0.shape[1:]), sigma)
        error = self.student.denoiser(x_t, sigma, self.space.told(batch)).x0 - x0
        weight = (sigma.square() + s.sigma_data**2) / (sigma * s.sigma_data).square()
        return {"loss": (per_sample(weight, error) * error.square()).mean()}

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        device = next(self.student.parameters()).device
        labels = self.space.condition(captions).arguments.get("class_labels")
        rows = {}
        for n in (4, self.settings.num_inference_steps):
            images = pipeline.to(device)(
                len(captions), labels, n, generator=seeded(len(captions), seed), output_type="pt"
            ).images
            rows[f"{n} steps"] = self.space.decode(images * 2 - 1)
        return rows

    def pipeline(self) -> EDMPipeline:
        s = self.settings
        scheduler = CMStochasticIterativeScheduler(
            sigma_min=s.sigma_min, sigma_max=s.sigma_max, sigma_data=s.sigma_data, rho=s.rho
        )
        return EDMPipeline(self.student.network, scheduler)

    @torch.no_grad()
    def export(self) -> Export:
        steps = self.settings.num_inference_steps
        return Export(self.pipeline(), sampling={"default": {"num_inference_steps": steps}})
