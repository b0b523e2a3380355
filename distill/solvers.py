"""One teacher step t -> s."""

from collections.abc import Callable

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
