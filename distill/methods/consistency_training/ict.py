"""Consistency training and distillation in EDM's noise levels: iCT (arXiv 2310.14189), with CT and CD (arXiv
2303.01469) and ECT (arXiv 2406.14548) as settings of one loss."""

import math
from functools import partial

import torch
from torch import Tensor

from ....pipelines.transformer_two_time import TwoTimeDiT
from ...diffusion.condition import Condition
from ...diffusion.denoiser import Denoiser, DenoiserView, reach, seen_in
from ...diffusion.guidance import guided_x0_eps
from ...diffusion.losses import mean_distance, pseudo_huber
from ...diffusion.solvers import euler_edm, heun_edm
from ...errors import UserError
from ...models.teacher import LatentTeacher
from ...training.contract import Batch, Parts, Progress
from ..space import Space, latent_space, pixel_space
from .base import ConsistencyTraining
from .curriculum import continuous_pairs
from .settings import ICTSettings


class ICT(ConsistencyTraining):
    """Consistency training with a pseudo-Huber distance.

    Needs a teacher for ode_source teacher, for its weights (student.init teacher) and for latents; from pixels it
    trains with none.
    """

    Settings = ICTSettings
    EXPORT_POINTS = 1281

    def __init__(self, settings: ICTSettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        if s.curriculum == "continuous" and s.noise == "uniform":
            raise UserError("method.noise: uniform: continuous pairs are lognormal; leave the key out")
        if s.guidance_scale != 1 and s.ode_source == "data":
            raise UserError(
                f"method.guidance_scale: {s.guidance_scale} guides the teacher's steps; set ode_source to teacher"
            )
        if s.ode_source == "teacher":
            self._reachable(self.source)

    @property
    def source(self) -> Denoiser:
        """The frozen teacher in this process. No submodule: `train()` would switch its dropout on."""
        return seen_in(self.parts.need_teacher().denoiser, self.process)

    def pairs(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        """sigma_lo, sigma_hi (B,) of this iteration; sigma_lo may be 0 in a continuous curriculum, which is cut to the
        levels that a network of another process has seen."""
        s = self.settings
        if s.curriculum != "continuous":
            return super().pairs(batch, progress)
        stage = progress.iteration * s.num_stages // progress.total
        seen = self.function.denoiser
        within = reach(seen) if isinstance(seen, DenoiserView) else (0.0, math.inf)
        return continuous_pairs(batch.draws, stage, s.p_mean, s.p_std, s.q, s.k, s.b, within=within)

    def step(
        self, x0: Tensor, eps: Tensor, x_hi: Tensor, high: Tensor, low: Tensor, condition: Condition
    ) -> Tensor:
        """x_lo: the same sample and noise at sigma_lo, or the teacher's step to it."""
        if self.settings.ode_source == "data":
            return super().step(x0, eps, x_hi, high, low, condition)
        denoise = partial(self.denoise, condition=condition)
        if self.settings.solver == "heun":
            return heun_edm(denoise, x_hi, high, low)
        return euler_edm(x_hi, denoise(x_hi, high), high, low)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The frozen teacher's x0, guided."""
        g = self.settings.guidance_scale
        if g == 1:
            return self.source(x, sigma, condition).x0
        return guided_x0_eps(self.source, x, sigma, condition, torch.full_like(sigma, g))[0]

    def predict(
        self, x: Tensor, sigma: Tensor, condition: Condition, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """f(x, sigma); in a continuous curriculum D itself, whose boundary is at sigma = 0, as ECT trains it."""
        if self.settings.curriculum == "continuous":
            return self.function.denoiser(x, sigma, condition, weights=weights).x0
        return super().predict(x, sigma, condition, weights)

    def aim(
        self,
        x_lo: Tensor,
        low: Tensor,
        high: Tensor,
        condition: Condition,
        weights: dict[str, Tensor] | None,
    ) -> Tensor:
        """f-(x_lo, sigma_lo); the clean sample where sigma_lo is 0, a level that no network is asked about."""
        positive = low > 0
        seen = super().aim(x_lo, torch.where(positive, low, high), high, condition, weights)
        return torch.where(positive.view(-1, *[1] * (x_lo.ndim - 1)), seen, x_lo)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,), before weighting."""
        s = self.settings
        if s.distance != "pseudo_huber":
            return mean_distance(s.distance, prediction, target)
        c = 0.00054 * prediction[0].numel() ** 0.5 if s.huber_c is None else s.huber_c
        return pseudo_huber(prediction, target, c)

    def _space(self) -> Space:
        if isinstance(self.parts.teacher, LatentTeacher):
            return latent_space(self.student.network, self.parts.teacher)
        if isinstance(self.student.network, TwoTimeDiT):
            raise UserError(
                "student.network: a TwoTimeDiT has no stock consistency pipeline; use a UNet2DModel"
            )
        return pixel_space(self.student.network, self.parts)
