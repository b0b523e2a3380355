"""One teacher step t -> s, deterministic or stochastic, and several of them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import NoiseProcess, per_sample


def ddim_step(x0: Tensor, eps: Tensor, process: NoiseProcess, s: Tensor) -> Tensor:
    """x_s = alpha(s) x0 + sigma(s) eps: DDIM with eta 0 (arXiv 2010.02502, eq. 12). x0, eps (B, ...), s (B,)."""
    return process.noised(x0, eps, s)


def euler_edm(x: Tensor, x0: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """x0 + (low/high) (x - x0): an Euler step of EDM's flow from sigma = high to low, (B,); x, x0 (B, ...)."""
    return x0 + per_sample(low / high, x) * (x - x0)


def heun_edm(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Heun's step of EDM's flow (arXiv 2206.00364, algorithm 1): the Euler step where low is 0.

    denoise(x, sigma) gives x0; it is called at `high`, then at `low`.
    """
    x0 = denoise(x, high)
    ahead = euler_edm(x, x0, high, low)
    positive = torch.where(low > 0, low, high)
    slope = (x - x0) / per_sample(high, x)
    second = (ahead - denoise(ahead, positive)) / per_sample(positive, x)
    corrected = x + per_sample(low - high, x) * (slope + second) / 2
    return torch.where(per_sample(low, x) > 0, corrected, ahead)


Variance = Callable[[NoiseProcess, Tensor, Tensor], Tensor]

# phi of ER-SDE (arXiv 2309.06169, appendix A.8) under the names of its released code; ODE injects nothing
NOISE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ODE": lambda x: x,
    "SDE": torch.square,
    "SDE_1": lambda x: x * ((-1 / x).exp() + 10),
    "SDE_2": lambda x: x**1.5,
    "SDE_3": lambda x: x**2.5,
    "SDE_4": lambda x: x**0.9 * (1 + 100 * x**1.5).log10(),
    "SDE_5": lambda x: x * ((x**0.3).exp() + 10),
}


def sde_step(
    x0: Tensor, eps: Tensor, process: NoiseProcess, s: Tensor, variance: Tensor, noise: Tensor
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) noise: v (B,) in [0, sigma_s^2] is fresh, the rest is kept.

    DDIM with eta (arXiv 2010.02502, eq. 12) and, of first order, ER-SDE, SDE-DPM-Solver++ and Euler ancestral differ
    in v alone. v = 0 is `ddim_step`.
    """
    kept = (process.sigma(s).square() - variance).clamp(min=0).sqrt()
    mean = per_sample(process.alpha(s), x0) * x0 + per_sample(kept, eps) * eps
    return mean + per_sample(variance.sqrt(), noise) * noise


def ddim_variance(process: NoiseProcess, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """v of DDIM (arXiv 2010.02502, eq. 16): eta^2 (sigma_s^2 / sigma_t^2) (1 - abar_t / abar_s).

    eta = 1 is SDE-DPM-Solver++ of first order and Euler ancestral.
    """
    ratio = (process.sigma(s) / process.sigma(t)).square()
    return eta**2 * ratio * (1 - (process.alpha(t) / process.alpha(s)).square()).clamp(min=0)


def er_sde_variance(process: NoiseProcess, t: Tensor, s: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """v of first-order ER-SDE (arXiv 2309.06169): alpha_s^2 (lam_s^2 - lam_t^2 r^2), r = phi(lam_s) / phi(lam_t).

    lam = sigma / alpha. A phi that falls slower than x itself would need a negative v.
    """
    lam_t, lam_s = (process.sigma(u) / process.alpha(u) for u in (t, s))
    r = phi(lam_s) / phi(lam_t)
    return process.alpha(s).square() * (lam_s.square() - lam_t.square() * r.square()).clamp(min=0)


def between(t: Tensor, s: Tensor, num_steps: int) -> list[Tensor]:
    """Whole times t = s_0 >= s_1 >= ... >= s_h = s, (B,) each; equal ones where there are fewer than h between."""
    return [t - (j * (t - s) / num_steps).round() for j in range(num_steps + 1)]


def sde_segment(
    guide: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    times: Sequence[Tensor],
    process: NoiseProcess,
    variance: Variance,
    fresh: Callable[[], Tensor],
) -> Tensor:
    """Stochastic steps along `times` from x at the first; guide(x, t) gives x0 and eps, fresh() unit noise like x."""
    for t, s in pairwise(times):
        x0, eps = guide(x, t)
        x = sde_step(x0, eps, process, s, variance(process, t, s), fresh())
    return x
