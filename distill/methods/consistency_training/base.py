"""Consistency training in EDM's noise levels but for its distance: pairs, boundary, target, samples, export."""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from torch import Tensor, nn

from ....pipelines.export import Export, in_float32
from ....pipelines.pipeline_class_latent_cm import ClassLatentCMPipeline
from ....pipelines.pipeline_latent_cm import LatentCMPipeline
from ...diffusion.condition import Condition
from ...diffusion.consistency import ConsistencyFunction, edm_boundary
from ...diffusion.denoiser import Denoiser, DenoiserView, seen_in
from ...diffusion.draws import random_state, same_random
from ...diffusion.ema import EMA
from ...diffusion.generator import Generator, fresh_from, seeded
from ...diffusion.process import EDM
from ...errors import UserError
from ...models.student import Student
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal
from ..space import PixelSpace, Space, space_of, start_of
from .curriculum import doubling, draw_pairs, lognormal_bins, scheduled_decay, square_root
from .settings import ConsistencySettings


class ConsistencyTraining(Method):
    """d(f(x_hi, sigma_hi), f-(x_lo, sigma_lo)) / (sigma_hi - sigma_lo), both with one dropout mask.

    The gradient flows through f(x_hi) alone. x_lo is the same sample and noise as x_hi unless `step` says otherwise.
    EXPORT_POINTS: of the exported scheduler's grid; its index stands for a sigma, whatever N training ended with.
    """

    EXPORT_POINTS: ClassVar[int]

    def __init__(self, settings: ConsistencySettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        if s.sigma_min >= s.sigma_max:
            raise UserError(f"method.sigma_min: {s.sigma_min} is not below method.sigma_max {s.sigma_max}")
        if not s.sigma_min < s.two_step_sigma < s.sigma_max:
            raise UserError(
                f"method.two_step_sigma: {s.two_step_sigma} is outside {s.sigma_min}..{s.sigma_max}"
            )
        if s.s0 > s.s1:
            raise UserError(f"method.s0: {s.s0} is above method.s1 {s.s1}; swap them")
        if parts.student.kind == "lora":
            raise UserError("student.kind: lora: this method trains all weights; set it to full")
        self.process = EDM(s.sigma_min, s.sigma_max, s.sigma_data, s.rho)
        self.student = Student(start_of(parts, self.process, "edm"), parts.student)
        denoiser = self._reachable(seen_in(self.student.denoiser, self.process))
        self.space = self._space()
        self.needs = self.space.needs
        self.function = ConsistencyFunction(denoiser, partial(edm_boundary, process=self.process))
        self.target = EMA(self.student.trained(), s.target_decay) if s.target == "ema" else None
        self.num_points = 0

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,), before weighting."""

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        condition = self.space.told(batch)
        x0 = self.space.samples(batch)
        low, high = self.pairs(batch, progress)
        eps = self.noise(x0, batch)
        x_hi = self.process.noised(x0, eps, high)

        state = random_state(x0.device)
        prediction = self.predict(x_hi, high, condition)
        with torch.no_grad():  # the only gradient is that of f(x_hi)
            x_lo = self.step(x0, eps, x_hi, high, low, condition)
        with torch.no_grad(), same_random(state, x0.device):
            weights = None if self.target is None else self.target.tensors()
            target = self.aim(x_lo, low, high, condition, weights)
        return self.losses(x0, prediction, target, low, high)

    def losses(
        self, x0: Tensor, prediction: Tensor, target: Tensor, low: Tensor, high: Tensor
    ) -> dict[str, Tensor]:
        """What `forward` returns for f(x_hi) and its target; low, high (B,)."""
        error = self.distance(prediction, target)
        uniform = self.settings.weighting == "uniform"
        weight = torch.ones_like(error) if uniform else 1 / (high - low).float()
        return {"loss": (weight * error).mean(), "distance": error.mean()}

    def pairs(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        """sigma_lo, sigma_hi (B,) of this iteration."""
        s = self.settings
        self.num_points = self.points_at(progress)
        sigmas = self.process.grid(self.num_points)
        bins = lognormal_bins(sigmas, s.p_mean, s.p_std) if s.noise == "lognormal" else None
        return draw_pairs(self.process, self.num_points, bins, batch.draws)

    def points_at(self, progress: Progress) -> int:
        """N(k), the number of noise levels."""
        s = self.settings
        if s.curriculum == "constant":
            return s.num_points
        rule = doubling if s.curriculum == "doubling" else square_root
        return rule(progress.iteration, progress.total, s.s0, s.s1)

    def noise(self, x0: Tensor, batch: Batch) -> Tensor:
        """Unit noise of both levels, like x0."""
        return batch.draws.normal(x0.shape[1:])

    def step(
        self, x0: Tensor, eps: Tensor, x_hi: Tensor, high: Tensor, low: Tensor, condition: Condition
    ) -> Tensor:
        """x_lo: the same sample and noise at sigma_lo."""
        return self.process.noised(x0, eps, low)

    def predict(
        self, x: Tensor, sigma: Tensor, condition: Condition, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """f(x, sigma)."""
        return self.function(x, sigma, condition, weights=weights)

    def aim(
        self,
        x_lo: Tensor,
        low: Tensor,
        high: Tensor,
        condition: Condition,
        weights: dict[str, Tensor] | None,
    ) -> Tensor:
        """f-(x_lo, sigma_lo)."""
        return self.predict(x_lo, low, condition, weights)

    def after(self, player: str) -> None:
        if self.target is None:
            return
        s = self.settings
        scheduled = s.curriculum == "sqrt"
        self.target.update(scheduled_decay(self.num_points, s.s0, s.target_decay) if scheduled else None)

    def times(self, num_steps: int) -> list[float]:
        """sigma of each step: those that the exported scheduler's indices stand for."""
        grid = self.process.grid(self.EXPORT_POINTS).flip(0)
        return [float(grid[i]) for i in sorted(self.calls()[str(num_steps)]["timesteps"])]

    def calls(self) -> dict[str, dict[str, Any]]:
        """sampling.json: indices into the scheduler's grid of noise levels, which it reads from the largest."""
        grid = self.process.grid(self.EXPORT_POINTS).flip(0)
        middle = max(1, int((grid - self.settings.two_step_sigma).abs().argmin()))
        return {"1": {"timesteps": [0]}, "2": {"timesteps": [middle, 0]}}

    @torch.no_grad()
    def sample(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Tensor:
        """x0 (B, C, H, W) by multistep consistency sampling, one random generator per picture."""
        fresh = fresh_from(generators)
        device = next(self.student.parameters()).device
        times = self.times(num_steps)
        noise = times[0] * fresh(torch.empty(len(captions), *self.space.shape, device=device))
        condition = self.space.condition(captions).to(device)
        return Generator(self.function, times)(noise, condition, fresh)

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        rows = {}
        for n in (1, 2):
            x0 = self.sample(captions, n, seeded(len(captions), seed))
            with torch.no_grad():
                rows[f"{n} steps"] = self.space.decode(x0)
        return rows

    def rehearsal(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Rehearsal:
        x0 = self.sample(captions, num_steps, generators)
        return Rehearsal(x0, self.space.inputs(captions), pixels=isinstance(self.space, PixelSpace))

    def export(self) -> Export:
        s, pixels = self.settings, isinstance(self.space, PixelSpace)
        scheduler = CMStochasticIterativeScheduler(
            num_train_timesteps=self.EXPORT_POINTS,
            sigma_min=s.sigma_min,
            sigma_max=s.sigma_max,
            sigma_data=s.sigma_data,
            rho=s.rho,
            clip_denoised=pixels,
        )
        network = self.student.network
        if pixels:
            return Export(ConsistencyModelPipeline(network, scheduler), sampling=self.calls())
        parts = {"unet": network, "scheduler": scheduler, **self.normalisation()}
        if "prompts" not in self.needs:
            assert self.parts.codec is not None
            vae = in_float32({"vae": self.parts.codec.vae})
            return Export(ClassLatentCMPipeline(**parts, **vae), sampling=self.calls())
        teacher = self.parts.need_latent_teacher().pipeline
        frozen = in_float32({k: getattr(teacher, k) for k in ("vae", "text_encoder", "tokenizer")})
        view = isinstance(self.function.denoiser, DenoiserView)
        pipeline = LatentCMPipeline(**parts, **frozen, noise_schedule=teacher.scheduler if view else None)
        return Export(pipeline, sampling=self.calls())

    def normalisation(self) -> dict[str, Any]:
        """What an exported latent pipeline is given beside its usual parts."""
        return {}

    def _space(self) -> Space:
        return space_of(self.student.network, self.parts)

    def _reachable(self, denoiser: Denoiser) -> Denoiser:
        """Refuses noise levels that a network trained in another process has never seen."""
        if isinstance(denoiser, DenoiserView):
            inner, (low, high) = denoiser.inner.process, self.process.t_range
            ends = torch.tensor(inner.t_range, dtype=torch.float64, device="cpu")  # also in a dry run
            least, most = (inner.sigma(ends) / inner.alpha(ends)).tolist()
            if low < least * (1 - 1e-3) or high > most * (1 + 1e-3):
                raise UserError(
                    f"method.sigma_min, sigma_max: {low} to {high}, but the teacher's noise goes from {least:.4g} to "
                    f"{most:.4g}; set them within it"
                )
        return denoiser
