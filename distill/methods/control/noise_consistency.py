"""Noise consistency: from noise that decided a condition to noise independent of it (NCT, arXiv 2506.19741)."""

import math
from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor, nn

from ...diffusion.losses import mean_distance, pseudo_huber
from ...diffusion.process import per_sample
from ...settings import Distance
from .settings import Grid


def coupling_sigmas(num_levels: int, grid: Grid = "trig") -> Tensor:
    """sigma_0 = 0 < ... < sigma_N = 1, (N + 1,) in float64.

    trig: sin(pi k / 2N), so that neighbouring noises are correlated by cos(pi / 2N) at every level; linear: k / N. The
    paper publishes no grid.
    """
    k = torch.arange(num_levels + 1, dtype=torch.float64, device="cpu") / num_levels
    return (0.5 * math.pi * k).sin() if grid == "trig" else k


def coupled(z: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """z_t = sqrt(1 - sigma^2) z + sigma eps, sigma (B,): unit Gaussian like z at every level (algorithm 1)."""
    return per_sample((1 - sigma.square()).sqrt(), z) * z + per_sample(sigma, z) * eps


def noise_consistency(
    generate: Callable[[Tensor], Tensor], z: Tensor, eps: Tensor, sigma_lo: Tensor, sigma_hi: Tensor
) -> tuple[Tensor, Tensor]:
    """The generator's outputs at the noisier and at the more coupled of two levels of one z and one eps (algorithm 1).

    `generate` holds the condition that z decided. The second output is the target, without a gradient.
    """
    with torch.no_grad():
        target = generate(coupled(z, eps, sigma_lo))
    return generate(coupled(z, eps, sigma_hi)), target


def output_distance(kind: Distance, prediction: Tensor, target: Tensor, huber_c: float) -> Tensor:
    """Mean over the batch: mean d^2 over a sample's elements, or sqrt(|d|^2 + c^2) - c of the whole (remark 1)."""
    if kind == "huber":
        return pseudo_huber(prediction, target, huber_c).mean()
    return mean_distance("l2", prediction, target).mean()


class Multiplier(nn.Module):
    """lambda of min_phi max_lambda>=0 L_con + lambda (L_bound - margin), a buffer and so part of checkpoints.

    The paper gives the rule; starting value, rate and margin are not published. A rate of 0 keeps lambda.
    """

    value: Tensor

    def __init__(self, start: float, rate: float, margin: float):
        super().__init__()
        self.rate, self.margin = rate, margin
        self.register_buffer("value", torch.tensor(start, dtype=torch.float64, device="cpu"))

    @torch.no_grad()
    def update(self, bound: Tensor) -> None:
        """lambda <- max(0, lambda + rate (L_bound - margin)), L_bound the mean over torch.distributed's processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            bound = bound.clone()
            torch.distributed.all_reduce(bound)
            bound /= torch.distributed.get_world_size()
        self.value.add_(self.rate * (bound.to(self.value) - self.margin)).clamp_(min=0)
