"""Which pairs of noise levels consistency training compares, and how that changes during a run."""

import math

import torch
from torch import Tensor

from ...diffusion.draws import Draws
from ...diffusion.process import EDM


def doubling(iteration: int, total: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)).

    iCT, arXiv 2310.14189, section 3.4.
    """
    stage = max(1, math.floor(total / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (iteration // stage), s1) + 1


def square_root(iteration: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (CT, arXiv 2303.01469, appendix C)."""
    inside = iteration / total * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(1, math.ceil(math.sqrt(inside) - 1)) + 1


def scheduled_decay(num_points: int, s0: int, decay: float) -> float:
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)), the target's decay under `square_root` (arXiv 2303.01469, appendix C)."""
    return math.exp(s0 * math.log(decay) / (num_points - 1))


def robust_scale(num_points: int, s0: int, first: float, slope: float, offset: float) -> float:
    """c of the Cauchy loss with N grid points: `first` in the first stage, then exp(slope ln(N - 1) + offset).

    sLCT, arXiv 2502.01441, as its code has it.
    """
    return first if num_points <= s0 + 1 else math.exp(slope * math.log(num_points - 1) + offset)


def early_level(sigmas: Tensor, share: float) -> float:
    """The largest sigma_hi of the pairs at the low-noise end: those j >= floor(share N) of pairs j = 0 .. N - 2 counted
    from the noisiest (arXiv 2502.01441); sigmas (N,) increase. sigma_min, which no pair has, where there are none."""
    total = len(sigmas)
    return float(sigmas[max(0, total - 1 - math.floor(share * total))])


def lognormal_bins(sigmas: Tensor, p_mean: float, p_std: float) -> Tensor:
    """p(i) of the N - 1 pairs (sigma_i, sigma_i+1): mass of ln sigma ~ N(p_mean, p_std^2) between them, normalised.

    iCT, arXiv 2310.14189, section 3.5; sigmas (N,) increase.
    """
    edges = torch.erf((sigmas.double().log() - p_mean) / (math.sqrt(2) * p_std))
    mass = edges.diff()
    return mass / mass.sum()


def draw_pairs(process: EDM, num_points: int, bins: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor]:
    """Neighbours sigma_lo < sigma_hi of the grid, (B,) each: pairs drawn from `bins` (N - 1,), uniformly without."""
    sigmas = process.grid(num_points).to(draws.device)
    if bins is None:
        index = draws.integers(0, num_points - 1)
    else:
        cumulated = bins.cumsum(0).to(draws.device)
        index = torch.searchsorted(cumulated, draws.uniform().double(), right=True).clamp(max=num_points - 2)
    return sigmas[index], sigmas[index + 1]


def continuous_pairs(
    draws: Draws,
    stage: int,
    p_mean: float,
    p_std: float,
    q: float,
    k: float,
    b: float,
    *,
    within: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """r < t, (B,) each: ln t ~ N(p_mean, p_std^2), r = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1))).

    ECT, arXiv 2406.14548; in its early stages many r are 0, the clean data. t is cut to `within`, the levels that the
    network has seen; an r below them is 0.
    """
    low, high = within
    t = (p_mean + p_std * draws.normal(()).double()).exp().clamp(low, high)
    r = t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))
    return torch.where(r < low, 0.0, r).clamp(min=0), t
