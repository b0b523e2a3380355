"""Latent consistency training from data (sLCT, arXiv 2502.01441): iCT in normalised latents with a Cauchy loss, a scale
that follows the number of levels, a diffusion loss at low noise, and optimal transport between samples and noise."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....pipelines.latent_statistics import LatentStatistics
from ...data.cache import LatentCache
from ...diffusion.losses import mean_distance, pseudo_huber, robust
from ...diffusion.process import EDM
from ...errors import UserError
from ...training.contract import Batch, Parts
from .base import ConsistencyTraining
from .coupling import optimal_pairing
from .curriculum import early_level, robust_scale
from .normalised_latents import NormalisedLatents, Statistics
from .settings import LCTSettings


class LCT(ConsistencyTraining):
    """rho(f(x_hi) - f-(x_lo)) / (sigma_hi - sigma_lo) and, near the data, a denoising loss of the same f(x_hi).

    Needs the autoencoder of a latent teacher or `vae`, and new weights. With `coupling` two processes do not equal one,
    and neither does a batch in parts: each is coupled for itself.
    """

    Settings = LCTSettings
    EXPORT_POINTS = 641

    def __init__(self, settings: LCTSettings, parts: Parts):
        if parts.codec is None:
            raise UserError("vae: missing; this method works in the latents of `vae` or of a latent teacher")
        if parts.student.init == "teacher":
            raise UserError("student.init: teacher: this method trains new weights; set it to scratch")
        s = settings
        if s.c is not None and s.distance in ("l2", "l1", "pseudo_huber"):
            raise UserError(f"method.c: has no effect on distance {s.distance}; leave it out")
        super().__init__(settings, parts)
        self.statistics = Statistics(self.space.shape, s.sigma_data) if s.normalise else None
        if self.statistics is not None:
            self.space = NormalisedLatents(self.space, self.statistics)

    def prepare(self, latents: LatentCache) -> None:
        if self.statistics is not None:
            assert self.parts.codec is not None
            self.statistics.measure(latents, self.parts.codec)

    def noise(self, x0: Tensor, batch: Batch) -> Tensor:
        """Unit noise, each row with the sample that optimal transport gives it; x0 and labels keep their order."""
        eps = super().noise(x0, batch)
        if self.settings.coupling == "none":
            return eps
        return eps[optimal_pairing(x0, eps, self.groups(batch))]

    def groups(self, batch: Batch) -> Sequence[Hashable] | None:
        """What each row is told; None where all are told the same."""
        arguments = self.space.told(batch).arguments
        if self.settings.coupling == "batch" or not arguments:
            return None
        return arguments["class_labels"].tolist() if "class_labels" in arguments else batch.captions

    def scale(self) -> float:
        """c at the current number of levels."""
        s = self.settings
        return s.c or robust_scale(self.num_points, s.s0, s.c_first, s.c_slope, s.c_offset)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        kind = self.settings.distance
        if kind == "pseudo_huber":
            return pseudo_huber(prediction, target, 0.00054 * prediction[0].numel() ** 0.5)
        if kind in ("l1", "l2"):
            return mean_distance(kind, prediction, target)
        return robust(kind, mean_distance("l2", prediction, target), self.scale())

    def losses(
        self, x0: Tensor, prediction: Tensor, target: Tensor, low: Tensor, high: Tensor
    ) -> dict[str, Tensor]:
        out = super().losses(x0, prediction, target, low, high)
        s = self.settings
        if s.diffusion_weight == 0:
            return out
        level = early_level(self.process.grid(self.num_points), s.diffusion_from)
        diffusion = early_diffusion(prediction, x0, high, level, self.process)
        return {**out, "loss": out["loss"] + s.diffusion_weight * diffusion, "diffusion": diffusion}

    def normalisation(self) -> dict[str, Any]:
        if self.statistics is None:
            return {}
        kept = LatentStatistics(tuple(self.space.shape), self.settings.sigma_data)
        kept.load_state_dict(self.statistics.state_dict())
        return {"statistics": kept}


def early_diffusion(prediction: Tensor, x0: Tensor, sigma: Tensor, level: float, process: EDM) -> Tensor:
    """EDM's weight times the mean square of prediction - x0, averaged where sigma <= level; 0 where that is nowhere.

    x0, prediction (B, ...), sigma (B,); weight 1 / sigma^2 + 1 / sigma_data^2 (arXiv 2206.00364, table 1).
    """
    weight = 1 / sigma.double().square() + 1 / process.sigma_data**2
    early = sigma <= level
    error = torch.where(early, weight, 0).float() * mean_distance("l2", prediction, x0)
    return error.sum() / early.sum().clamp(min=1)
