"""Score-regularised continuous-time consistency (rCM, arXiv 2510.08431), and sCM (arXiv 2410.11081) as its part."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion.denoiser import Prediction
from ...diffusion.derivative import scaled_derivative
from ...diffusion.draws import Draws, random_state, same_random
from ...diffusion.losses import unit_step
from ...diffusion.process import per_sample
from ...errors import UserError
from ...training.contract import Batch, Parts, Progress
from .base import ScoreDistillation
from .score import lognormal_times, matching_loss, output_weight, shifted_times, velocity_loss
from .settings import RCMSettings, Warmup


class RCM(ScoreDistillation):
    """scm_weight |F - sg(F + g / (|g| + c))|^2 on noised data, and score_weight times `matching_loss` on rollouts.

    Both are sums over a sample's elements and means over the batch. The consistency term's value is about 1 whatever
    the student: watch log_rate, the mean ln |df/dt|, and teacher_gap, the mean squared difference of student's and
    teacher's x0. The derivative is taken without a gradient in a pass of its own, with the graded pass's random state.
    """

    Settings = RCMSettings

    def __init__(self, settings: RCMSettings, parts: Parts):
        s = settings
        check(s)
        taught = s.source == "teacher" and s.scm_weight > 0
        super().__init__(s, parts, sigma_data=s.sigma_data, taught=taught, scored=s.score_weight > 0)
        self.log_weight = LogWeight() if s.adaptive else None

    def players(self) -> dict[str, list[nn.Parameter]]:
        out = super().players()
        if self.log_weight is not None:
            out["student"] += list(self.log_weight.parameters())
        return out

    def turns(self, progress: Progress) -> tuple[str, ...]:
        late = progress.iteration - self.settings.tangent_warmup
        if not self.scored or late < 0 or late % self.settings.student_update_freq == 0:
            return ("student",)
        return ("fake_score",)

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        s, told = self.settings, self.space.told(batch)
        num_steps = progress.updates[player] % s.max_rollout + 1
        if player == "fake_score":
            assert self.fake_score is not None
            with torch.no_grad():
                sample = self.rollout(batch.draws, told, num_steps)
            t = self.score_times(batch.draws)
            x, eps = self.noised(sample, t, batch.draws)
            error = velocity_loss(self.fake_score(self.process, x, t, told), sample, eps)
            return {"loss": (self.row_weight(t).square() * error).mean()}
        out: dict[str, Tensor] = {}
        if s.scm_weight:
            out = self.consistency(batch, progress)
            out["loss"] = s.scm_weight * out["consistency"]
        if self.scored and progress.iteration >= s.tangent_warmup:
            sample = self.rollout(batch.draws, told, num_steps)
            scores = self.scores(sample, self.score_times(batch.draws), told, batch.draws)
            out["score"] = matching_loss(sample, *scores).mean()
            out["loss"] = out.get("loss", 0) + s.score_weight * out["score"]
        return out

    def consistency(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The consistency term and its diagnostics (arXiv 2510.08431; arXiv 2410.11081, algorithm 1)."""
        s, draws, told = self.settings, batch.draws, self.space.told(batch)
        x0 = self.space.samples(batch).double()
        t = lognormal_times(draws, self.process, s.p_mean, s.p_std).clamp(*self.within)
        x, eps = self.noised(x0, t, draws)
        scale = t.cos() * t.sin()
        with torch.no_grad():
            views = self.guided(x, t, told) if s.source == "teacher" else (x0, eps)
            velocity = self.velocity(t, views)
            weights = {k: p.detach() for k, p in self.student.network.named_parameters()}
            with same_random(random_state(x.device), x.device):
                derivative = scaled_derivative(
                    self.denoiser, weights, x, t, velocity, scale, told,
                    by=s.derivative, step=s.derivative_step, within=self.within,
                )  # fmt: skip
        seen = self.denoiser(x, t, told)
        r = min(1.0, progress.iteration / s.tangent_warmup) if s.tangent_warmup else 1.0
        g = tangent(s.tangent_form, r, x, t, seen.velocity.detach(), velocity, derivative)
        square, finite = self.squares(seen, g)
        loss = square
        if self.log_weight is not None:
            w = self.log_weight(self.process.sigma(t) / self.process.alpha(t))
            loss = w.exp() * square / x0[0].numel() - w
        loss = self.row_weight(t) * loss
        rate = tangent("scm", 1.0, x, t, seen.velocity.detach(), velocity, derivative)
        rate = torch.where(finite, torch.linalg.vector_norm(rate.flatten(1), dim=1) / t.cos(), 1.0)
        out = {
            "consistency": loss.mean(),
            "log_rate": rate.log().mean(),
            "skipped": (~finite).double().mean(),
        }
        if s.source == "teacher":
            out["teacher_gap"] = (seen.x0.detach() - views[0]).square().mean()
        return out

    def row_weight(self, t: Tensor) -> Tensor:
        """(B,), as `output_weight` says."""
        ones = torch.ones_like(t, dtype=torch.float64)
        return output_weight(self.denoiser, t) if self.settings.output_weight else ones

    def squares(self, seen: Prediction, g: Tensor) -> tuple[Tensor, Tensor]:
        """|F - sg(F + g / (|g| + c))|^2, (B,), 0 for samples with a number that is not finite, and which have none."""
        s, f = self.settings, seen.velocity / self.process.sigma_data
        finite = (f.isfinite() & g.isfinite()).flatten(1).all(1)
        kept = finite.view(-1, *[1] * (g.ndim - 1))
        f, g = torch.where(kept, f, 0.0), torch.where(kept, g, 0.0)
        return unit_step(f, g, 1.0, s.tangent_c, s.per_element), finite

    def score_times(self, draws: Draws) -> Tensor:
        s = self.settings
        if s.score_law == "shifted":
            return shifted_times(draws, self.process, s.score_shift).clamp(*self.within)
        return lognormal_times(draws, self.process, s.score_p_mean, s.score_p_std).clamp(*self.within)

    def rollout_times(self, draws: Draws, num_steps: int) -> list[Tensor]:
        first = torch.full(
            (len(draws.generators),), self.start_time, dtype=torch.float64, device=draws.device
        )
        times = [first]
        for n in range(1, num_steps):
            fixed = self.settings.rollout_times
            later = self.score_times(draws) if fixed is None else torch.full_like(first, fixed[n - 1])
            times.append(torch.minimum(times[-1], later))
        return times

    def sampling_times(self) -> list[float]:
        s = self.settings
        return [min(math.atan(s.sigma_max / s.sigma_data), self.start_time), *s.times]


class LogWeight(nn.Module):
    """w of algorithm 1 in arXiv 2410.11081: a linear layer on Fourier features of ln(sigma)/4, 0 at the start."""

    def __init__(self, num_features: int = 64):
        super().__init__()
        self.frequencies = torch.exp(torch.linspace(0.0, math.log(16.0), num_features // 2, device="cpu"))
        self.linear = nn.Linear(num_features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = (sigma.log() / 4).float()[:, None] * self.frequencies.to(sigma.device)
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear.weight.dtype)
        return self.linear(features)[:, 0].double()


def tangent(
    form: Warmup, r: float, x: Tensor, t: Tensor, student: Tensor, velocity: Tensor, derivative: Tensor
) -> Tensor:
    """g = cos t df/dt at r = 1, in whatever form; (B, ...).

    student and velocity: sigma_data F of the student and dx/dt; derivative: J = cos t sin t d(sigma_data F)/dt.
    code   -c sqrt(1 - r^2 s^2) (F - v) - (r c s x + J)    rCM's released code
    paper  -c sqrt(1 - r^2 s^2) (F - v) - r (c s x + J)    rCM's paper as its issue 18 reads it
    scm    -c^2 (F - v) - r (c s x + J)                    sCM (arXiv 2410.11081, algorithm 1)
    """
    c, s = per_sample(t.cos(), x), per_sample(t.sin(), x)
    gap = student - velocity
    if form == "scm":
        return -c * c * gap - r * (c * s * x + derivative)
    first = -c * (1 - (r * s).square()).sqrt() * gap
    if form == "code":
        return first - (r * c * s * x + derivative)
    return first - r * (c * s * x + derivative)


def check(s: RCMSettings) -> None:
    """UserError for settings that contradict each other or would have no effect."""
    if s.scm_weight == 0 == s.score_weight:
        raise UserError("method.score_weight: 0, and method.scm_weight too; nothing is left to train on")
    if s.scm_weight == 0 and (s.tangent_warmup or s.adaptive):
        raise UserError(
            "method.tangent_warmup, adaptive: no effect without the consistency term; leave them out, or set scm_weight"
        )
    if s.source == "data" and s.guidance_scale != 1 and s.score_weight == 0:
        raise UserError(
            f"method.guidance_scale: {s.guidance_scale} guides the teacher; set method.source to teacher"
        )
    if s.rollout_times is not None and len(s.rollout_times) < s.max_rollout - 1:
        raise UserError(
            f"method.rollout_times: {len(s.rollout_times)} for rollouts of up to {s.max_rollout} steps; give "
            f"{s.max_rollout - 1}"
        )
