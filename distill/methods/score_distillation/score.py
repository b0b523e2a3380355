"""Distribution matching: the fake score, its loss, the student's loss, and the noise levels that both are taken at."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ...diffusion.condition import Condition
from ...diffusion.denoiser import Denoiser, DenoiserView, Prediction, seen_in
from ...diffusion.draws import Draws
from ...diffusion.process import NoiseProcess, TrigFlow, per_sample
from ...models.discriminator import no_recomputation
from ...models.student import Student
from ...settings import StudentSettings


class FakeScore(nn.Module):
    """The denoiser of the student's own samples (DMD, arXiv 2311.18828), started at the weights that the student has.

    full: a network of its own. lora: an adapter of its own on the base network that it shares with student and teacher;
    each call then puts its weights in place of the student's.
    """

    def __init__(self, base: Denoiser, student: Student):
        super().__init__()
        self._shared = (student,)  # a tuple, so that the student is no submodule of this one
        self.own = None if student.lora else Student(base, StudentSettings())
        adapter = student.trained() if student.lora else {}
        self.adapter = nn.ParameterDict(
            {k.replace(".", "/"): nn.Parameter(p.detach().clone()) for k, p in adapter.items()}
        )

    def forward(
        self,
        process: NoiseProcess,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        features: Sequence[str] = (),
        frozen: bool = False,
    ) -> Prediction:
        """The prediction in `process`; `frozen`: gradients reach x_t alone."""
        denoiser = (self.own or self._shared[0]).denoiser
        weights = {k.replace("/", "."): p for k, p in self.adapter.items()}
        if frozen and self.own is not None:
            weights = self.own.trained()
        if frozen:
            weights = {k: p.detach() for k, p in weights.items()}
        with no_recomputation(denoiser.network) if weights else nullcontext():
            view = seen_in(denoiser, process)
            return view(x_t, t, condition, features=features, weights=weights or None)


def matching_loss(sample: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """|G - sg(G - grad)|^2, (B,) in float64, whose gradient with respect to the sample G is 2 grad.

    grad = (fake x0 - teacher x0) / mean |G - teacher x0| (DMD, arXiv 2311.18828, eq. 7 and 8); a sample where it is not
    finite gives 0.
    """
    g, fake, teacher = (x.detach().double().flatten(1) for x in (sample, fake_x0, teacher_x0))
    grad = (fake - teacher) / (g - teacher).abs().mean(1, keepdim=True).clamp(min=1e-5)
    grad = torch.where(grad.isfinite().all(1, keepdim=True), grad, 0.0)
    return (sample.double().flatten(1) - (g - grad)).square().sum(1)


def velocity_loss(seen: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """|F - v|^2, (B,): in TrigFlow the same as |x0 - f(x_t)|^2 / sin^2 t, without the division."""
    process, t = seen.process, seen.t
    assert isinstance(process, TrigFlow)
    target = per_sample(process.alpha_dot(t), x0) * x0 + per_sample(process.sigma_dot(t), eps) * eps
    return ((seen.velocity - target) / process.sigma_data).square().flatten(1).sum(1)


def output_weight(denoiser: Denoiser, t: Tensor) -> Tensor:
    """1 / |dF/d output|, (B,) in float64, of the network behind a denoiser of TrigFlow, where dx_t/dt = sigma_data F.

    cos t for one that predicts noise: F = eps / cos t - x_t tan t / sigma_data, so that a change of its output counts
    14.7 times at the last time of Stable Diffusion. sigma_data sin t for one that predicts x0. 1 for v, straight paths,
    EDM and TrigFlow, whose outputs are F up to a factor near 1.
    """
    process = denoiser.process
    assert isinstance(process, TrigFlow)
    kind = denoiser.inner.kind if isinstance(denoiser, DenoiserView) else denoiser.kind
    if kind == "epsilon":
        return process.alpha(t)
    return process.sigma(t) if kind == "sample" else torch.ones_like(t, dtype=torch.float64)


def lognormal_times(draws: Draws, process: TrigFlow, mean: float, std: float) -> Tensor:
    """t with ln(sigma_data tan t) ~ N(mean, std^2) (arXiv 2410.11081, algorithm 1), (B,) in float64."""
    sigma = (mean + std * draws.normal(()).double()).exp()
    return torch.atan(sigma / process.sigma_data)


def shifted_times(draws: Draws, process: TrigFlow, shift: float) -> Tensor:
    """t of the straight path's tau = k u / (1 + (k - 1) u), u uniform; tan t = tau / (1 - tau) (rCM, table 4)."""
    u = draws.uniform().double()
    return torch.atan(shift * u / (1 - u) / process.sigma_data)


def native_times(
    draws: Draws, process: TrigFlow, native: NoiseProcess, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Times uniform between two shares of another process's range, as times of this one, (B,) in float64."""
    u = low + (high - low) * draws.uniform().double()
    return process.time_of(native.log_snr(native.share(u)))
