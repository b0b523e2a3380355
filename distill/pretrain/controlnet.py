"""Trains a ControlNet of a diffusion teacher on pictures, as ControlNets are (arXiv 2302.05543): the rival of NCT."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.export import Export, in_float32
from ..diffusion.draws import Draws
from ..diffusion.generator import ddim_sample, ends_at_data, seeded
from ..errors import UserError
from ..models.frozen import weights_hash
from ..models.one_step import ControlledDenoiser, controlnet_of
from ..training.contract import Batch, Method, Parts, Progress
from ..training.notes import Notes
from .settings import ControlNetSettings


class ControlNetTraining(Method):
    """E |eps_hat(alpha x0 + sigma eps, t, c, c_f) - eps|^2 (arXiv 2302.05543, eq. 5) over the ControlNet alone.

    t is uniform on the training steps; c_f is what the control sees of the picture.
    """

    Settings = ControlNetSettings
    needs = frozenset({"images", "latents", "prompts"})

    def __init__(self, settings: ControlNetSettings, parts: Parts):
        super().__init__(settings, parts)
        parts.need_no_student("the network is frozen and its control a ControlNet")
        self.teacher = parts.need_latent_teacher()
        if self.teacher.family.control_class is None:
            kind = type(self.teacher.pipeline).__name__
            raise UserError(f"teacher.path: no pipeline of diffusers samples a {kind} with our ControlNet")
        self.controlnet = controlnet_of(self.teacher)
        self.view = settings.control.load(parts.vision)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"control": list(self.controlnet.parameters())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.images is not None and batch.latents is not None and batch.condition is not None
        process, draws = self.teacher.process, batch.draws
        x0 = self.teacher.latents(batch.latents, draws)
        t = draws.integers(0, int(process.t_range[1]) + 1).double()
        eps = draws.normal(x0.shape[1:])
        told = batch.condition.drop(draws.uniform() < self.settings.caption_dropout)
        picture = self.view(batch.images / 2 + 0.5, draws)
        seen = self.controlled(picture)(process.noised(x0, eps, t), t, told)
        return {"loss": (seen.eps - eps).square().mean()}

    def controlled(self, picture: Tensor) -> ControlledDenoiser:
        return ControlledDenoiser(self.teacher.denoiser, self.controlnet, picture)

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        """Samples of the teacher, what the control sees of them, and controlled samples of other noise."""
        device = next(self.controlnet.parameters()).device
        told = self.teacher.condition(captions).to(device)

        def sampled(denoiser: Any, first: int) -> Tensor:
            generators = seeded(len(captions), first)
            latents = ddim_sample(
                denoiser, self.teacher.shape, told, 20, self.settings.guidance_scale, generators,
                to_data=ends_at_data(self.teacher.pipeline.scheduler),
            )  # fmt: skip
            return self.teacher.decode(latents)

        plain = sampled(self.teacher.denoiser, seed)
        draws = Draws(seed, 0, range(len(captions)), device)
        picture = self.view((plain / 2 + 0.5).float().clamp(0, 1), draws)
        other = sampled(self.controlled(picture), seed + len(captions))
        return {"teacher": plain, "condition": 2 * picture - 1, "20 steps": other}

    def export(self) -> Export:
        """diffusers' ControlNet pipeline with the teacher's scheduler; its controlnet/ alone is the adapter."""
        network = self.teacher.family.network
        pipeline = self.teacher.assembled(
            in_float32({"unet": network})["unet"],
            self.teacher.family.control_class,
            controlnet=self.controlnet,
        )
        notes = Notes(
            "control.json",
            {
                "generator": Path(self.teacher.path).name,
                "generator_hash": weights_hash(network),
                "control": self.settings.control.record(),
            },
        )
        call = {"guidance_scale": self.settings.guidance_scale, **self.teacher.call()}
        return Export(pipeline, beside=[notes], sampling={"default": call})
