"""Stochastic consistency distillation (SCott, arXiv 2403.01505)."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...diffusion.generator import lcm_timesteps
from ...diffusion.losses import hinge_critic, hinge_generator
from ...diffusion.solvers import (
    NOISE_FUNCTIONS,
    Variance,
    between,
    ddim_variance,
    er_sde_variance,
    sde_segment,
)
from ...errors import UserError
from ...models.discriminator import Discriminator
from ...models.frozen import frozen
from ...training.contract import Batch, Parts, Progress
from .base import LatentConsistency
from .settings import SCottSettings

LCM_STEPS = 50


class SCott(LatentConsistency):
    """z_lo is a solution of the teacher's SDE with controlled noise; a discriminator judges the prediction.

    Players: student, then discriminator on the same prediction, real side: the data's latents.
    """

    Settings = SCottSettings

    def __init__(self, settings: SCottSettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        if s.segment >= self.total:
            raise UserError(f"method.segment: {s.segment} is not below the teacher's {self.total} steps")
        self.variance = variance_of(s)
        self.discriminator = (
            Discriminator(self.teacher.denoiser.network, s.discriminator_rank) if s.lambda_adv else None
        )

    def players(self) -> dict[str, list[nn.Parameter]]:
        judge = {} if self.discriminator is None else {"discriminator": list(self.discriminator.parameters())}
        return {**super().players(), **judge}

    def optimiser(self, player: str) -> dict[str, Any]:
        s = self.settings
        if player == "student":
            return {}
        return {"lr": s.discriminator_lr, "betas": (s.discriminator_beta1, 0.999)}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        if player == "discriminator":
            return {
                "loss": hinge_critic(self.judged(carry["real"], carry), self.judged(carry["fake"], carry))
            }
        s, step = self.settings, self.step(batch)
        distance = self.distance(step)
        spread = step.prediction.detach().float().var() / step.z0.float().var()
        out = {"loss": distance, "distance": distance, "variance": spread}
        if self.discriminator is None:
            return out
        carry["t"], carry["prompts"] = step.t_hi, step.prompts
        if s.renoise:
            carry["t"] = batch.draws.integers(1, self.total).double()
            carry["noise"] = batch.draws.normal(step.z0.shape[1:])
        carry["real"], carry["fake"] = step.z0, step.prediction.detach()
        with frozen(self.discriminator.parameters()):
            adversarial = hinge_generator(self.judged(step.prediction, carry))
        if progress.iteration >= s.gan_start_step:
            out["loss"] = distance + s.lambda_adv * adversarial
        return {**out, "adversarial": adversarial}

    def judged(self, x: Tensor, carry: dict[str, Any]) -> Tensor:
        """The discriminator's logits of clean latents x, at the student's time or renoised to another."""
        assert self.discriminator is not None
        if "noise" in carry:
            x = self.process.noised(x, carry["noise"], carry["t"])
        with self.student.teacher_mode():
            return self.discriminator(self.teacher.denoiser, x, carry["t"], carry["prompts"])

    def sampling_grid(self) -> list[int]:
        if self.settings.times == "grid":
            return list(range(self.total - 1, 0, -self.settings.segment))[::-1]
        return lcm_timesteps(LCM_STEPS, LCM_STEPS, self.total)[::-1]

    def training_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        s = self.settings
        if s.times == "grid":
            n = len(self.grid)
            t_hi = self.total - 1 - (n - 1 - draws.integers(0, n)) * s.segment
        else:
            t_hi = draws.integers(1, self.total)
        return t_hi.double(), (t_hi - s.segment).clamp(min=0).double()

    def teacher_step(
        self, z: Tensor, t_hi: Tensor, t_lo: Tensor, condition: Condition, w: Tensor, draws: Draws
    ) -> Tensor:
        guide = partial(self.guide, condition=condition, w=w)
        times = between(t_hi, t_lo, self.settings.num_solver_steps)
        return sde_segment(guide, z, times, self.process, self.variance, lambda: draws.normal(z.shape[1:]))


def variance_of(s: SCottSettings) -> Variance:
    """The injected variance of a step under these settings."""
    if s.solver == "ddim" and s.eta is None:
        raise UserError("method.eta: missing; solver ddim needs it, between 0 (no noise) and 1")
    if s.solver != "ddim" and s.eta is not None:
        raise UserError(f"method.eta: {s.eta} has no effect on solver {s.solver}; set method.solver to ddim")
    if s.solver != "er_sde" and s.noise_function is not None:
        raise UserError(
            f"method.noise_function: {s.noise_function} has no effect on solver {s.solver}; leave it out"
        )
    if s.solver == "er_sde":
        return partial(er_sde_variance, phi=NOISE_FUNCTIONS[s.noise_function or "SDE_5"])
    return partial(ddim_variance, eta=1.0 if s.eta is None else s.eta)
