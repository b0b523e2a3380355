"""MeanFlow (arXiv 2505.13447) from data or a teacher, with improved MeanFlow's tangent (arXiv 2512.02012)."""

from functools import cached_property
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ....pipelines.export import Export, in_float32
from ....pipelines.pipeline_latent_meanflow import LatentMeanFlowPipeline
from ....pipelines.pipeline_meanflow import MeanFlowPipeline
from ...diffusion.condition import Condition
from ...diffusion.denoiser import Denoiser, DenoiserView, reach, seen_in
from ...diffusion.derivative import derivative_of, rows_with_span
from ...diffusion.draws import Draws, random_state, same_random
from ...diffusion.generator import fresh_from, mean_velocity_sample, seeded
from ...diffusion.guidance import guided_velocity
from ...diffusion.losses import adaptive, unit_step
from ...diffusion.process import RectifiedFlow, per_sample
from ...errors import UserError
from ...models.student import Student
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal
from ..space import ClassLatentSpace, LatentSpace, PixelSpace, space_of, start_of
from .dispersive import dispersive
from .settings import MeanFlowSettings
from .spans import draw_spans
from .targets import alpha_target, annealed_alpha, split_target

EXPORTED_STEPS = (1, 2, 4)
ALPHA_KEYS = ("alpha_start", "alpha_end", "alpha_gamma", "alpha_clip", "target_clip")
DERIVATIVE_KEYS = ("tangent", "tangent_warmup", "derivative", "derivative_step")


class MeanFlow(Method):
    """u(z_t, r, t) is pulled to v - (t - r) d/dt u (arXiv 2505.13447, eq. 6 and 10), t = 0 the data, t = 1 the noise.

    The gradient flows through u alone: velocity, tangent and target are computed without one, the derivative in a
    pass of its own. Rows with r = t need no derivative: that pass leaves them out, unless the network has dropout,
    whose masks must be those of the graded pass. Times are cut to what teacher and student were trained on.
    """

    Settings = MeanFlowSettings

    def __init__(self, settings: MeanFlowSettings, parts: Parts):
        super().__init__(settings, parts)
        check(settings, parts)
        self.process = RectifiedFlow()
        self.student = Student(start_of(parts, self.process, "velocity"), parts.student, two_times=True)
        self.denoiser = seen_in(self.student.denoiser, self.process)
        self.space = space_of(self.student.network, parts)
        self.needs = self.space.needs
        if settings.source == "teacher" and not isinstance(self.space, LatentSpace):
            raise UserError(
                "method.source: teacher, but the student takes no texts; leave student.network out"
            )
        if isinstance(self.space, PixelSpace) and (settings.omega, settings.kappa) != (1, 0):
            raise UserError("method.omega, kappa: the network is told nothing to guide by; leave them out")
        ends = [reach(d) for d in (self.denoiser, self.source) if d is not None]
        self.within = max(low for low, _ in ends), min(high for _, high in ends)
        self.drops = any(m.p > 0 for m in self.student.modules() if isinstance(m, nn.Dropout))
        for name in settings.dispersive_blocks:
            if name not in dict(self.student.network.named_modules()):
                raise UserError(
                    f"method.dispersive_blocks: the network has no module {name!r}; see its printout"
                )

    @cached_property
    def source(self) -> Denoiser | None:
        """The frozen teacher in straight paths; no submodule, so that it stays in evaluation mode."""
        if self.settings.source == "data":
            return None
        return seen_in(self.parts.need_teacher().denoiser, self.process)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"student": list(self.student.trained().values())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        s, x0 = self.settings, self.space.samples(batch)
        r, t = self.spans(batch.draws)
        eps = batch.draws.normal(x0.shape[1:])
        z = self.process.noised(x0, eps, t)
        with torch.no_grad():  # the only gradient is that of u
            velocity, tangent, told = self.velocities(x0, eps, z, t, batch)
            target, weight = self.target(z, r, t, velocity, tangent, told, batch.draws, progress)
        seen = self.denoiser(z, t, told, r=r, features=s.dispersive_blocks)
        u = seen.velocity
        squares = (u - target).square().flatten(1)
        weight = weight.to(squares.dtype)
        if s.loss == "l2":
            errors = squares.mean(1) if s.per_element else squares.sum(1)
            loss = (weight * adaptive(errors, s.norm_p, s.norm_c)).mean()
        else:
            loss = (weight * unit_step(u, target - u, s.norm_p, s.norm_c, s.per_element)).mean()
        error, point = squares.detach().mean(1), (r == t).float()
        out = {
            "loss": loss,
            "error": error.mean(),
            "v_error": (point * error).sum() / point.sum().clamp(min=1),
        }
        if s.dispersive != "none":
            parts = [dispersive(s.dispersive, h, s.dispersive_tau) for h in seen.features.values()]
            out["dispersion"] = torch.stack(parts).sum()
            out["loss"] = loss + s.dispersive_weight * out["dispersion"]
        return out

    def spans(self, draws: Draws) -> tuple[Tensor, Tensor]:
        s = self.settings
        r_normal = None if s.r_mean is None or s.r_std is None else (s.r_mean, s.r_std)
        return draw_spans(draws, s.span_law, s.ratio, (s.p_mean, s.p_std), r_normal, within=self.within)

    def velocities(
        self, x0: Tensor, eps: Tensor, z: Tensor, t: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Condition]:
        """The velocity of the target, that of the tangent, and the condition that both belong to."""
        s, told = self.settings, self.space.told(batch)
        inside = (t >= s.guidance_start) & (t <= s.guidance_end)
        if self.source is not None:
            velocity = self.taught(self.source, z, t, told, inside)
        else:
            velocity = eps - x0
            if told.empty:
                dropped = batch.draws.uniform() < s.condition_dropout
                velocity = self.guided(velocity, z, t, told, inside & ~dropped)
                told = told.drop(dropped)
        if s.tangent == "student":
            return velocity, self.instantaneous(z, t, told), told
        return velocity, velocity, told

    def taught(self, teacher: Denoiser, z: Tensor, t: Tensor, told: Condition, inside: Tensor) -> Tensor:
        """The teacher's velocity, guided by omega where `inside`."""
        if self.settings.omega == 1:
            return teacher(z, t, told).velocity
        scale = torch.where(inside, self.settings.omega, 1.0)
        return guided_velocity(teacher, z, t, told, scale)

    def guided(self, velocity: Tensor, z: Tensor, t: Tensor, told: Condition, inside: Tensor) -> Tensor:
        """omega v + (1 - omega - kappa) u(z, t, t | none) + kappa u(z, t, t | y) where `inside` (section 4.2)."""
        omega, kappa = self.settings.omega, self.settings.kappa
        if (omega, kappa) == (1, 0):
            return velocity
        mixed = omega * velocity + (1 - omega - kappa) * self.instantaneous(z, t, told.null())
        if kappa:
            mixed = mixed + kappa * self.instantaneous(z, t, told)
        return torch.where(inside.view(-1, *[1] * (z.ndim - 1)), mixed, velocity)

    def instantaneous(self, z: Tensor, t: Tensor, told: Condition) -> Tensor:
        return self.denoiser(z, t, told, r=t).velocity

    def target(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        velocity: Tensor,
        tangent: Tensor,
        told: Condition,
        draws: Draws,
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """What u(z, r, t) is pulled to, the velocity itself where r = t, and the rows' weights (B,)."""
        s, one = self.settings, torch.ones_like(t)
        state = random_state(z.device)
        alpha = 0.0
        if s.target == "alpha_flow":
            done = progress.iteration / progress.total
            alpha = annealed_alpha(done, s.alpha_start, s.alpha_end, s.alpha_gamma, s.alpha_clip)
        if s.target != "split" and alpha == 0:
            with same_random(state, z.device):
                rate = self.rate(z, r, t, tangent, told)
            warm = min(1.0, progress.iteration / s.tangent_warmup) if s.tangent_warmup else 1.0
            return velocity - warm * per_sample(t - r, z) * rate, one
        share = draws.uniform().double() if s.target == "split" else one
        rows = rows_with_span(r, t, self.drops)
        target = velocity.clone()
        if len(rows) == 0:
            return target, one
        chosen = told.rows(rows)

        def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
            with same_random(state, z.device):
                return self.denoiser(z, t, chosen, r=r).velocity

        span = z[rows], r[rows], t[rows]
        if s.target == "split":
            found = split_target(u, *span, share[rows])
        else:
            found = alpha_target(u, *span, velocity[rows], tangent[rows], alpha)
            if s.target_clip is not None:
                found = found.clamp(-s.target_clip, s.target_clip)
        point = (r == t)[rows].view(-1, *[1] * (z.ndim - 1))
        target[rows] = torch.where(point, velocity[rows], found)
        return target, torch.where(r < t, alpha, 1.0) if s.target == "alpha_flow" else one

    def rate(self, z: Tensor, r: Tensor, t: Tensor, tangent: Tensor, told: Condition) -> Tensor:
        """d/dt u of the student along (tangent, 0, 1)."""
        s = self.settings
        weights = {k: p.detach() for k, p in self.student.network.named_parameters()}
        return derivative_of(
            self.denoiser, weights, z, r, t, tangent, told, every_row=self.drops,
            by=s.derivative, step=s.derivative_step, t_max=self.within[1],
        )  # fmt: skip

    def times(self, num_steps: int) -> list[float]:
        """Even from the largest time to 0, num_steps + 1 of them."""
        return [self.within[1] * (1 - i / num_steps) for i in range(num_steps + 1)]

    def calls(self) -> dict[str, dict[str, Any]]:
        """sampling.json: FlowMatchEulerDiscreteScheduler's own sigmas would end at 0.001."""
        return {str(n): {"sigmas": self.times(n)[:-1]} for n in EXPORTED_STEPS}

    @torch.no_grad()
    def sample(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Tensor:
        """x0 (B, C, H, W) from noise at the largest time, one random generator per picture."""
        device = next(self.student.parameters()).device
        noise = fresh_from(generators)(torch.empty(len(captions), *self.space.shape, device=device))
        told = self.space.condition(captions).to(device)
        return mean_velocity_sample(self.denoiser, noise, told, self.times(num_steps))

    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        rows = {}
        for n in EXPORTED_STEPS:
            z = self.sample(captions, n, seeded(len(captions), seed))
            with torch.no_grad():
                rows[f"{n} steps"] = self.space.decode(z)
        return rows

    def rehearsal(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Rehearsal:
        return Rehearsal(self.sample(captions, num_steps, generators), self.space.inputs(captions))

    def export(self) -> Export:
        s, network = self.settings, self.student.network
        shared: dict[str, Any] = {
            "unet": network,
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "t_max": self.within[1],
            "guidance": {
                "scale": s.omega / (1 - s.kappa), "start": s.guidance_start, "end": s.guidance_end,
            },
        }  # fmt: skip
        if isinstance(self.space, LatentSpace):
            teacher = self.space.teacher.pipeline
            parts = in_float32({k: getattr(teacher, k) for k in ("vae", "text_encoder", "tokenizer")})
            view = isinstance(self.denoiser, DenoiserView)
            pipeline: Any = LatentMeanFlowPipeline(
                **shared, **parts, noise_schedule=teacher.scheduler if view else None
            )
        else:
            codec = self.space.codec if isinstance(self.space, ClassLatentSpace) else None
            vae = {} if codec is None else in_float32({"vae": codec.vae})
            pipeline = MeanFlowPipeline(**shared, **vae)
        return Export(pipeline, sampling=self.calls())


def check(s: MeanFlowSettings, parts: Parts) -> None:
    """UserError for settings that contradict each other or would have no effect."""
    student = parts.student
    if student.kind == "lora":
        raise UserError("student.kind: lora: the second time needs weights of its own; set it to full")
    if student.init == "teacher" and parts.teacher is None:
        raise UserError("student.init: teacher, but there is none; add one, or set it to scratch")
    if student.init == "teacher":
        parts.need_latent_teacher()
    if s.source == "teacher" and s.kappa:
        raise UserError("method.kappa: it mixes in the student's velocity; from a teacher use omega alone")
    if s.guidance_start > s.guidance_end:
        raise UserError(f"method.guidance_start: {s.guidance_start} is above guidance_end {s.guidance_end}")
    separate = s.span_law == "separate"
    if separate != (s.r_mean is not None) or separate != (s.r_std is not None):
        raise UserError("method.r_mean, r_std: span_law separate needs both, sorted takes neither")
    unused = [] if s.target == "alpha_flow" else list(ALPHA_KEYS)
    for key in [*unused, *(DERIVATIVE_KEYS if s.target == "split" else ())]:
        if getattr(s, key) != getattr(MeanFlowSettings(), key):
            raise UserError(f"method.{key}: has no effect on target {s.target}; leave it out")
    if s.alpha_start >= s.alpha_end:
        raise UserError(f"method.alpha_start: {s.alpha_start} is not below alpha_end {s.alpha_end}")
    if (s.dispersive == "none") != (not s.dispersive_blocks):
        raise UserError("method.dispersive_blocks: name the modules to disperse, and none without dispersive")
