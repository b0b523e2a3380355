"""Targets of a mean velocity over r < t that need no derivative: α-Flow and SplitMeanFlow."""

import math
from collections.abc import Callable

from torch import Tensor

from ...diffusion.process import per_sample

Field = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(z, r, t) with z (B, ...), r and t (B,)


def alpha_target(
    u: Field, z: Tensor, r: Tensor, t: Tensor, velocity: Tensor, tangent: Tensor, alpha: float
) -> Tensor:
    """alpha v + (1 - alpha) u(z - (t - s) w, r, s), s = t - alpha (t - r), along the tangent w (arXiv 2510.20771).

    alpha 1 is flow matching over the whole span. As alpha goes to 0 the difference to u(z, r, t) is alpha times
    that of the MeanFlow target. r < t in every row; (B, ...).
    """
    if alpha == 1:
        return velocity
    s = t - alpha * (t - r)
    behind = u(z - per_sample(t - s, z) * tangent, r, s)
    return alpha * velocity + (1 - alpha) * behind


def split_target(u: Field, z: Tensor, r: Tensor, t: Tensor, share: Tensor) -> Tensor:
    """(1 - share) u(z_s, r, s) + share u(z, s, t), s = (1 - share) t + share r, z_s = z - (t - s) u(z, s, t).

    The mean velocity over [r, t] as the mean of those over its two parts (SplitMeanFlow, arXiv 2507.16884);
    share (B,) in [0, 1]; (B, ...).
    """
    s = (1 - share) * t + share * r
    upper = u(z, s, t)
    lower = u(z - per_sample(t - s, z) * upper, r, s)
    return per_sample(1 - share, z) * lower + per_sample(share, z) * upper


def annealed_alpha(done: float, start: float, end: float, gamma: float, clip: float) -> float:
    """1 down to 0 as a sigmoid of `done` in [start, end], gamma / (end - start) steep; 1 before and 0 after.

    Within `clip` of either end it is that end: below, the target is MeanFlow's own, with its derivative.
    """
    if done < start:
        return 1.0
    if done >= end:
        return 0.0
    alpha = 1 / (1 + math.exp(gamma * (done - (start + end) / 2) / (end - start)))
    return 0.0 if alpha < clip else 1.0 if alpha > 1 - clip else alpha
