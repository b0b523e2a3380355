"""d/dt of a two-time network along a path: the derivative in the MeanFlow identity, by four back ends."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import ForwardModeAttention
from ...kernels.function_mode import ContiguousGroupNorm
from ..settings import Derivative
from .condition import Condition
from .denoiser import Denoiser
from .draws import random_state, same_random
from .process import per_sample

DERIVATIVES = get_args(Derivative)
Field = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(z, r, t) with z (B, ...), r and t (B,)


def derivative_of(
    denoiser: Denoiser,
    weights: dict[str, Tensor],
    z: Tensor,
    r: Tensor,
    t: Tensor,
    tangent: Tensor,
    condition: Condition,
    *,
    every_row: bool = False,
    **how: Any,
) -> Tensor:
    """`total_derivative` of a two-time denoiser's velocity with these detached weights along (tangent, 0, 1).

    In float32 whatever autocast says. Rows with r = t, where it would be multiplied by 0, are left out and 0, unless
    `every_row`: dropout then draws masks of the whole batch.
    """
    rows = rows_with_span(r, t, every_row)
    out = torch.zeros_like(z)
    if len(rows) == 0:
        return out
    told = condition.rows(rows)

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return denoiser(z, t, told, r=r, weights=weights).velocity

    with nullcontext() if z.is_meta else torch.autocast(z.device.type, enabled=False):
        out[rows] = total_derivative(u, z[rows], r[rows], t[rows], tangent[rows], **how)
    return out


def rows_with_span(r: Tensor, t: Tensor, every_row: bool) -> Tensor:
    """Indices of the rows with r < t, or of every row, as on the meta device, where values are not known."""
    if every_row or t.is_meta:
        return torch.arange(len(t), device=t.device)
    return (r < t).nonzero()[:, 0]


def total_derivative(
    u: Field,
    z: Tensor,
    r: Tensor,
    t: Tensor,
    velocity: Tensor,
    *,
    by: Derivative = "kernel",
    step: float = 5e-3,
    t_max: float = 1.0,
) -> Tensor:
    """d/dt u(z, r, t) = v . d_z u + d_t u with r held: the JVP along (v, 0, 1) in (z, r, t) (arXiv 2505.13447, eq. 8).

    kernel             forward mode with fewstep.kernels' attention, memory linear in the number of tokens
    math               forward mode with torch's unfused attention
    double_backward    two reverse passes, unfused attention: where an operator has no forward-mode formula
    finite_difference  two calls `step` apart in t, any attention; `t_max` and r are not passed

    The result carries no gradient; u may not hold parameters that require one.
    """
    if by == "finite_difference":
        with torch.no_grad():
            return central_difference(u, z, r, t, velocity, step, t_max)
    return directional(u, (z, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)), by)


def scaled_derivative(
    denoiser: Denoiser,
    weights: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    velocity: Tensor,
    scale: Tensor,
    condition: Condition,
    *,
    by: Derivative,
    step: float,
    within: tuple[float, float],
) -> Tensor:
    """scale d/dt of a denoiser's velocity along dx/dt = `velocity`, (B, ...) without a gradient, scale (B,).

    Forward mode starts from scale (velocity, 1) and never holds the bare derivative, whose time part may be unbounded
    where `scale` vanishes (the rearranged JVP of sCM, arXiv 2410.11081, section 4). finite_difference: central, at
    times `within`. Network and tangents in float32 whatever autocast says.
    """

    def u(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, condition, weights=weights).velocity

    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if by != "finite_difference":
            return directional(u, (x, t), (per_sample(scale, x) * velocity, scale), by)
        with torch.no_grad():
            low = torch.full_like(t, within[0])
            rate = central_difference(lambda x, _, t: u(x, t), x, low, t, velocity, step, within[1])
            return per_sample(scale, x) * rate


def directional(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], by: Derivative
) -> Tensor:
    """The derivative of f at `at` in the direction `along`, without a gradient, by one of the first three back ends."""
    with torch.no_grad():
        if by == "kernel":
            with ForwardModeAttention():
                return torch.func.jvp(f, at, along)[1]
        if by == "math":
            with sdpa_kernel(SDPBackend.MATH), ContiguousGroupNorm():
                return torch.func.jvp(f, at, along)[1]
        assert by == "double_backward"
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            return torch.autograd.functional.jvp(f, at, along)[1].detach()


def central_difference(
    u: Field, z: Tensor, r: Tensor, t: Tensor, velocity: Tensor, step: float, t_max: float
) -> Tensor:
    """(u(z + e v, r, t + e) - u(z - e v, r, t - e)) / 2e, one-sided where t + e > t_max or t - e < r.

    Times and states in float64 until the network casts them.
    """
    state = random_state(z.device)
    z, v, r, t = (x.double() for x in (z, velocity, r, t))
    forward = torch.where(t + step <= t_max, step, 0.0).to(t)
    backward = torch.where((t - step >= r) | (forward == 0), step, 0.0).to(t)
    ahead = u(z + per_sample(forward, z) * v, r, t + forward)
    with same_random(state, z.device):
        behind = u(z - per_sample(backward, z) * v, r, t - backward)
    return ((ahead - behind) / per_sample(forward + backward, z)).to(velocity.dtype)
