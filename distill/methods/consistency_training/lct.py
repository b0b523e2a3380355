"""Latent consistency training from data (sLCT, arXiv 2502.01441): iCT in normalised latents with a Cauchy loss, a scale
that follows the number of levels, a diffusion loss at low noise, and optimal transport between samples and noise."""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ....pipelines.latent_statistics import LatentStatistics
from ...data import LatentCache
from ...diffusion.losses import mean_distance, pseudo_huber, robust
from ...diffusion.process import EDM
from ...errors import UserError
from ...settings import Idle, settings
from ...training.contract import Batch, Parts, Published
from .base import ConsistencySettings, ConsistencyTraining
from .coupling import optimal_pairing
from .curriculum import early_level, robust_scale
from .normalised_latents import NormalisedLatents, Statistics

READ = "sLCT paper, 1 / 2 steps, as a stored copy of its tables has them"
PUBLISHED = tuple(
    Published(benchmark, "FID", steps, value, READ)
    for benchmark, values in (
        ("CelebA-HQ 256 x 256", (7.27, 6.93)),
        ("LSUN Church 256 x 256", (8.87, 7.71)),
        ("FFHQ 256 x 256", (8.72, 8.29)),
    )
    for steps, value in zip((1, 2), values, strict=True)
)


@settings
class LCTSettings(ConsistencySettings):
    """Those of consistency training with s1 = 640, and

    distance          of the mean square over a sample: cauchy, geman_mcclure, mean_huber (all with c), l2; of the mean
                      absolute value: l1; of the whole sample: pseudo_huber, iCT's with its own c = 0.00054 sqrt(D)
    c                 constant; without it c_first in the first stage, then exp(c_slope ln(N - 1) + c_offset), as in the
                      paper's code
    diffusion_weight  of EDM's denoising loss (arXiv 2206.00364, table 1) on the pairs of the low-noise end, from the
                      share diffusion_from of the levels counted from the noisiest
    coupling          noise by optimal transport over the rows of a process's batch that are told the same (condition),
                      over all of them (batch), or as it is drawn (none)
    normalise         each element of the latents to mean 0 and standard deviation sigma_data over the training set;
                      else sigma_data must be that of the latents
    """

    s1: int = Field(640, ge=2)
    two_step_sigma: float = Field(0.369, gt=0)
    curriculum: Literal["doubling", "sqrt", "constant"] = "doubling"
    distance: Literal["cauchy", "geman_mcclure", "mean_huber", "l2", "l1", "pseudo_huber"] = "cauchy"
    c: float | None = Field(None, gt=0)
    c_first: float = Field(
        0.03456, gt=0
    )  # 0.00054 sqrt(4 x 32 x 32), of latents of 256 px; of a mean, so of any size
    c_slope: float = -1.15
    c_offset: float = -0.85
    diffusion_weight: float = Field(5.0, ge=0)
    diffusion_from: float = Field(0.75, ge=0, le=1)
    coupling: Literal["condition", "batch", "none"] = "condition"
    normalise: bool = True

    idle: ClassVar[tuple[Idle, ...]] = (
        *(row for row in ConsistencySettings.idle if "method.s0" not in row.keys),
        Idle("method.s1", "method.curriculum", only=("doubling", "sqrt")),
        Idle("method.c method.c_first method.c_slope method.c_offset", "method.distance",
             only=("cauchy", "geman_mcclure", "mean_huber")),
        Idle("method.c_first method.c_slope method.c_offset", "method.c", only=(None,)),
        Idle("method.diffusion_from", "method.diffusion_weight", values=(0,)),
    )  # fmt: skip


class LCT(ConsistencyTraining):
    """rho(f(x_hi) - f-(x_lo)) / (sigma_hi - sigma_lo) and, near the data, a denoising loss of the same f(x_hi).

    Needs the autoencoder of a latent teacher or `vae`, and new weights. With `coupling` two processes do not equal one,
    and neither does a batch in parts: each is coupled for itself.
    """

    Settings = LCTSettings
    EXPORT_POINTS = 641
    published = PUBLISHED

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
