"""Which spans r <= t two-time networks are trained on."""

import torch
from torch import Tensor

from ...diffusion.draws import Draws
from .settings import SpanLaw


def draw_spans(
    draws: Draws,
    law: SpanLaw,
    ratio: float,
    t_normal: tuple[float, float],
    r_normal: tuple[float, float] | None = None,
    *,
    within: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """r <= t, (B,) each, in float64, cut to `within`; r < t in about the share `ratio` of rows (arXiv 2505.13447, 4.3).

    t_normal, r_normal: mean and standard deviation of logit t and logit r, r's being t's where None.
    sorted    r and t are the smaller and the larger of two, then r = t in the share 1 - ratio of rows
    separate  r = t in that share first, then r = min(r, t): r = t in more than 1 - ratio of rows (py-meanflow's v1)
    """
    first = logit_normal(draws, *t_normal)
    second = logit_normal(draws, *(r_normal or t_normal))
    point = draws.uniform().double() >= ratio
    if law == "sorted":
        r, t = torch.minimum(first, second), torch.maximum(first, second)
        r = torch.where(point, t, r)
    else:
        t = first
        r = torch.minimum(torch.where(point, t, second), t)
    return r.clamp(*within), t.clamp(*within)


def logit_normal(draws: Draws, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std n), n ~ N(0, 1), (B,) in float64."""
    return torch.sigmoid(mean + std * draws.normal(()).double())
