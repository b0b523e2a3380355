"""NCT: a control for a frozen one-step generator, trained without images (arXiv 2506.19741)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.export import Export
from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...diffusion.generator import fresh_from, seeded
from ...models.frozen import weights_hash
from ...models.one_step import OneStep
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal
from ...training.notes import Notes
from .control_adapters import ControlNetAdapter, adapter_of
from .noise_consistency import Multiplier, coupling_sigmas, noise_consistency, output_distance
from .settings import NCTSettings


class NCT(Method):
    """L_con + lambda L_bound on latents of the frozen generator alone (algorithm 1).

    The condition is taken from the generator's own sample x of z. L_con pulls the controlled sample of a noisier
    relative of z to that of a less noisy one; L_bound keeps the controlled sample of z itself at x.
    """

    Settings = NCTSettings
    needs = frozenset({"prompts"})

    def __init__(self, settings: NCTSettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        parts.need_no_student("the generator is frozen and its control an adapter")
        self.teacher = parts.need_latent_teacher()
        self.generator = OneStep(self.teacher, s.timestep, s.guidance_scale)
        self.view = s.control.load(parts.vision)
        self.adapter = adapter_of(self.generator, self.view)
        self.add_module(self.adapter.name, self.adapter.module)
        self.multiplier = Multiplier(s.boundary_weight, s.dual_lr, s.margin)
        self.sigmas = coupling_sigmas(s.num_levels, s.grid)
        self.bounds: list[Tensor] = []

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"control": list(self.adapter.module.parameters())}

    def passed_through(self) -> list[nn.Module]:
        return [self.adapter.network]

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.condition is not None
        s, draws, told = self.settings, batch.draws, batch.condition
        z, eps = draws.normal(self.teacher.shape), draws.normal(self.teacher.shape)
        if s.prompt_dropout:
            told = told.drop(draws.uniform() < s.prompt_dropout)
        x, seen = self.sampled(z, told, draws)

        def generate(noise: Tensor) -> Tensor:
            return self.adapter(noise, told, seen)

        k = draws.integers(0, s.num_levels)
        sigmas = self.sigmas.to(z.device)
        consistency = self.distance(*noise_consistency(generate, z, eps, sigmas[k], sigmas[k + 1]))
        boundary = self.distance(generate(z), x)
        self.bounds.append(boundary.detach())
        weight = self.multiplier.value.float()
        return {
            "loss": consistency + weight * boundary,
            "consistency": consistency,
            "boundary": boundary,
            "boundary_weight": weight,
        }

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return output_distance(self.settings.distance, prediction, target, self.settings.huber_c)

    @torch.no_grad()
    def sampled(self, z: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Tensor]:
        """The frozen generator's latents of z without the control, and what the control sees of them."""
        x = self.generator(z, told)
        return x, self.view(self.decoded(x), draws)

    def decoded(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        return (self.teacher.decode(x) / 2 + 0.5).float().clamp(0, 1)

    def after(self, player: str) -> None:
        self.multiplier.update(torch.stack(self.bounds).mean())
        self.bounds.clear()

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        """Samples of the frozen generator, what the control sees of them, and controlled samples of other noise."""
        device = next(self.adapter.module.parameters()).device
        like = torch.empty(len(captions), *self.teacher.shape, device=device)
        z, other = (fresh_from(seeded(len(captions), s))(like) for s in (seed, seed + len(captions)))
        told = self.teacher.condition(captions).to(device)
        x, seen = self.sampled(z, told, Draws(seed, 0, range(len(captions)), device))
        shown = self.settings.control.shown(self.decoded(x), seen)
        return {
            "generator": self.teacher.decode(x),
            "condition": 2 * shown - 1,
            "1 step": self.teacher.decode(self.adapter(other, told, seen)),
        }

    @torch.no_grad()
    def rehearsal(
        self, captions: list[str], num_steps: int, generators: list[torch.Generator]
    ) -> Rehearsal | None:
        """None of an IP-Adapter, which the pipeline gets from the folder alone."""
        if not isinstance(self.adapter, ControlNetAdapter):
            return None
        device = next(self.adapter.module.parameters()).device
        noise = fresh_from(generators)(torch.empty(len(captions), *self.teacher.shape, device=device))
        told = self.teacher.condition(captions).to(device)
        draws = Draws(0, 0, range(len(captions)), device)
        _, seen = self.sampled(torch.ones_like(noise), told, draws)
        return Rehearsal(self.adapter(noise, told, seen), {"prompt": captions, "image": seen})

    def export(self) -> Export:
        """The generator with its adapter, as diffusers opens them; controlnet/ or ip_adapter/ alone is the adapter."""
        s = self.settings
        notes = Notes(
            "control.json",
            {
                "generator": Path(self.teacher.path).name,
                "generator_hash": weights_hash(self.generator.network),
                "control": s.control.record(),
                "timestep": self.generator.timestep,
                "guidance_scale": self.generator.guidance_scale,
                "levels": s.num_levels,
                "grid": s.grid,
                "distance": s.distance,
                "margin": s.margin,
                "boundary_weight": float(self.multiplier.value),
            },
        )
        beside = [*self.adapter.beside(), notes]
        return Export(self.adapter.pipeline(), beside=beside, sampling={"1": self.generator.call()})
