"""Consistency training and distillation in EDM's noise levels: iCT (arXiv 2310.14189), with CT and CD (arXiv
2303.01469) and ECT (arXiv 2406.14548) as settings of one loss."""

from functools import partial
from typing import Any, Literal

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from pydantic import Field
from torch import Tensor, nn

from ...pipelines.export import Export, in_float32
from ...pipelines.pipeline_latent_cm import LatentCMPipeline
from ...pipelines.transformer_two_time import TwoTimeDiT
from ..condition import Condition
from ..config import settings
from ..consistency import ConsistencyFunction, edm_boundary
from ..curriculum import (
    Curriculum,
    continuous_pairs,
    doubling,
    draw_pairs,
    lognormal_bins,
    scheduled_decay,
    square_root,
)
from ..denoiser import Denoiser, DenoiserView, seen_in
from ..draws import random_state, same_random
from ..ema import EMA
from ..errors import UserError
from ..generator import Generator, fresh_from, seeded
from ..guidance import guided_x0_eps
from ..losses import mean_distance, pseudo_huber
from ..process import EDM
from ..solvers import euler_edm, heun_edm
from ..space import LatentSpace, Space, latent_space, pixel_space
from ..student import Student, new_denoiser, renewed
from ..teacher import LatentTeacher
from .base import Batch, Method, Parts, Progress, Published

EXPORT_POINTS = (
    1281  # of the exported scheduler's grid; its index stands for a sigma, whatever N training ended with
)
RECALLED = "iCT paper, table {}; recalled, not re-read"
PUBLISHED = tuple(
    Published(benchmark, "FID", steps, value, RECALLED.format(table))
    for benchmark, table, values in (
        ("CIFAR-10, unconditional", "2", (2.83, 2.46)),
        ("ImageNet 64 x 64, class-conditional", "3", (4.02, 3.20)),
    )
    for steps, value in zip((1, 2), values, strict=True)
)


@settings
class ICTSettings:
    """Defaults are iCT's.

    ode_source         where x_lo comes from: the data's own noise, or a step of the teacher's ODE (CD)
    target             whose weights see x_lo: the student's own, without a gradient, or their average (CT, CD)
    curriculum         number of noise levels: doubling from s0 to s1 (iCT), its square growing (CT), constant at
                       num_points (CD), or continuous pairs (ECT) with q, k, b over num_stages equal stages
    noise              pairs drawn lognormally with p_mean, p_std, or uniformly
    distance, huber_c  pseudo_huber of the whole sample, c = 0.00054 sqrt(D) unless given (0: the norm); or mean l1, l2
    weighting          inverse_gap 1 / (sigma_hi - sigma_lo), or uniform
    solver             of the teacher's step; guidance_scale of the teacher, 1 = off
    target_decay       of the averaged target, scheduled with N under sqrt
    sigma_*, rho       the EDM process; sigma_data is the data's standard deviation per element
    two_step_sigma     where the second step of pictures and sampling.json starts
    """

    ode_source: Literal["data", "teacher"] = "data"
    target: Literal["student", "ema"] = "student"
    curriculum: Curriculum = "doubling"
    s0: int = Field(10, ge=1)
    s1: int = Field(1280, ge=2)
    num_points: int = Field(18, ge=2)
    q: float = Field(2.0, gt=1)
    k: float = Field(8.0, ge=0)
    b: float = Field(1.0, ge=0)
    num_stages: int = Field(8, ge=1)
    noise: Literal["lognormal", "uniform"] = "lognormal"
    p_mean: float = -1.1
    p_std: float = Field(2.0, gt=0)
    distance: Literal["pseudo_huber", "l1", "l2"] = "pseudo_huber"
    huber_c: float | None = Field(None, ge=0)
    weighting: Literal["inverse_gap", "uniform"] = "inverse_gap"
    solver: Literal["heun", "euler"] = "heun"
    guidance_scale: float = Field(1.0, ge=1)
    target_decay: float = Field(0.9, gt=0, lt=1)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    rho: float = Field(7.0, gt=0)
    two_step_sigma: float = Field(0.821, gt=0)


class ICT(Method):
    """d(f(x_hi, sigma_hi), f-(x_lo, sigma_lo)) / (sigma_hi - sigma_lo), both with one dropout mask.

    The gradient flows through f(x_hi) alone. Needs a teacher for ode_source teacher, for its weights
    (student.init teacher) and for latents; from pixels it trains with none.
    """

    Settings = ICTSettings
    published = PUBLISHED

    def __init__(self, settings: ICTSettings, parts: Parts):
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
        if s.curriculum == "continuous" and s.noise == "uniform":
            raise UserError("method.noise: uniform: continuous pairs are lognormal; leave the key out")
        if s.guidance_scale != 1 and s.ode_source == "data":
            raise UserError(
                f"method.guidance_scale: {s.guidance_scale} guides the teacher's steps; set ode_source to teacher"
            )
        self.process = EDM(s.sigma_min, s.sigma_max, s.sigma_data, s.rho)
        if s.ode_source == "teacher":
            self._reachable(self.source)
        base = self._base()
        self.student = Student(base, parts.student)
        denoiser = self._reachable(seen_in(self.student.denoiser, self.process))
        self.space = self._space()
        self.needs = self.space.needs
        self.function = ConsistencyFunction(denoiser, partial(edm_boundary, process=self.process))
        self.target = EMA(self.student.trained(), s.target_decay) if s.target == "ema" else None
        self.num_points = 0

    @property
    def source(self) -> Denoiser:
        """The frozen teacher in this process. No submodule: `train()` would switch its dropout on."""
        return seen_in(self.parts.need_teacher().denoiser, self.process)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        s, draws, condition = self.settings, batch.draws, self.space.told(batch)
        x0 = self.space.samples(batch)
        low, high = self.pairs(batch, progress)
        eps = draws.normal(x0.shape[1:])
        x_hi = self.process.noised(x0, eps, high)

        state = random_state(x0.device)
        prediction = self.predict(x_hi, high, condition)
        with torch.no_grad():  # the only gradient is that of f(x_hi)
            x_lo = self.step(x0, eps, x_hi, high, low, condition)
        with torch.no_grad(), same_random(state, x0.device):
            weights = None if self.target is None else self.target.tensors()
            positive = torch.where(low > 0, low, high)
            target = self.predict(x_lo, positive, condition, weights)
            target = torch.where((low > 0).view(-1, *[1] * (x0.ndim - 1)), target, x_lo)
        error = self.distance(prediction, target)
        weight = 1 / (high - low).float() if s.weighting == "inverse_gap" else torch.ones_like(error)
        return {"loss": (weight * error).mean(), "distance": error.mean()}

    def pairs(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        """sigma_lo, sigma_hi (B,) of this iteration; sigma_lo may be 0 in a continuous curriculum."""
        s = self.settings
        if s.curriculum == "continuous":
            stage = progress.iteration * s.num_stages // progress.total
            return continuous_pairs(batch.draws, stage, s.p_mean, s.p_std, s.q, s.k, s.b)
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

    def step(
        self, x0: Tensor, eps: Tensor, x_hi: Tensor, high: Tensor, low: Tensor, condition: Condition
    ) -> Tensor:
        """x_lo: the same sample and noise at sigma_lo, or the teacher's step to it."""
        if self.settings.ode_source == "data":
            return self.process.noised(x0, eps, low)
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
        return self.function(x, sigma, condition, weights=weights)

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B,), before weighting."""
        s = self.settings
        if s.distance != "pseudo_huber":
            return mean_distance(s.distance, prediction, target)
        c = 0.00054 * prediction[0].numel() ** 0.5 if s.huber_c is None else s.huber_c
        return pseudo_huber(prediction, target, c)

    def after(self, player: str) -> None:
        if self.target is None:
            return
        s = self.settings
        scheduled = s.curriculum == "sqrt"
        self.target.update(scheduled_decay(self.num_points, s.s0, s.target_decay) if scheduled else None)

    def times(self, num_steps: int) -> list[float]:
        """sigma of each step: those that the exported scheduler's indices stand for."""
        grid = self.process.grid(EXPORT_POINTS).flip(0)
        return [float(grid[i]) for i in sorted(self.calls()[str(num_steps)]["timesteps"])]

    def calls(self) -> dict[str, dict[str, Any]]:
        """sampling.json: indices into the scheduler's grid of noise levels, which it reads from the largest."""
        grid = self.process.grid(EXPORT_POINTS).flip(0)
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

    def export(self) -> Export:
        s = self.settings
        latent = isinstance(self.space, LatentSpace)
        scheduler = CMStochasticIterativeScheduler(
            num_train_timesteps=EXPORT_POINTS,
            sigma_min=s.sigma_min,
            sigma_max=s.sigma_max,
            sigma_data=s.sigma_data,
            rho=s.rho,
            clip_denoised=not latent,
        )
        if not latent:
            return Export(ConsistencyModelPipeline(self.student.network, scheduler), sampling=self.calls())
        assert isinstance(self.parts.teacher, LatentTeacher)
        teacher = self.parts.teacher.pipeline
        view = isinstance(self.function.denoiser, DenoiserView)
        parts = in_float32({k: getattr(teacher, k) for k in ("vae", "text_encoder", "tokenizer")})
        pipeline = LatentCMPipeline(
            unet=self.student.network,
            scheduler=scheduler,
            noise_schedule=teacher.scheduler if view else None,
            **parts,
        )
        return Export(pipeline, sampling=self.calls())

    def _base(self) -> Denoiser:
        """What the student starts from."""
        student, teacher = self.parts.student, self.parts.teacher
        if student.init == "teacher":
            if student.network is not None:
                raise UserError(
                    "student.network: has no effect beside init: teacher; set student.init to scratch"
                )
            base = self.parts.need_teacher().denoiser
            if isinstance(base.process, EDM) and base.process.sigma_data != self.process.sigma_data:
                raise UserError(
                    f"method.sigma_data: {self.process.sigma_data}, but the teacher's network was made for "
                    f"{base.process.sigma_data}; make them equal"
                )
            return base
        if student.network is not None:
            return new_denoiser(student.network, self.process, "edm")
        if teacher is None:
            raise UserError("student.network: missing; without a teacher the architecture must be given")
        return renewed(teacher.denoiser, self.process, "edm")

    def _space(self) -> Space:
        if isinstance(self.parts.teacher, LatentTeacher):
            return latent_space(self.student.network, self.parts.teacher)
        if isinstance(self.student.network, TwoTimeDiT):
            raise UserError(
                "student.network: a TwoTimeDiT has no stock consistency pipeline; use a UNet2DModel"
            )
        return pixel_space(self.student.network, self.parts)

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
