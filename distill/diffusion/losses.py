"""Distances between predictions."""

from typing import Literal

import torch
from torch import Tensor

from ..settings import Distance


def distance(kind: Distance, prediction: Tensor, target: Tensor, huber_c: float = 1e-3) -> Tensor:
    """Mean over all elements, in float32: pseudo-Huber sqrt(d^2 + c^2) - c (arXiv 2310.14189, eq. 7), or d^2."""
    d = prediction.float() - target.float()
    if kind == "huber":
        return ((d.square() + huber_c**2).sqrt() - huber_c).mean()
    return d.square().mean()


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + c^2) - c of each sample's whole difference, (B,), in float32 (arXiv 2310.14189, eq. 7).

    With c = 0 the norm itself, whose gradient at no difference is 0. The sum over a sample's elements is taken inside
    the root: c = 0.00054 sqrt(D) belongs to it, not to a mean. Written as |d|^2 / (sqrt(|d|^2 + c^2) + c), which is
    exact where |d| is far below c, and 0 at 0.
    """
    d = (prediction.float() - target.float()).flatten(1)
    if c == 0:
        return torch.linalg.vector_norm(d, dim=1)
    squared = d.square().sum(1)
    return squared / ((squared + c**2).sqrt() + c)


def mean_distance(kind: Literal["l1", "l2"], prediction: Tensor, target: Tensor) -> Tensor:
    """Mean |d| or d^2 over each sample's elements, (B,), in float32."""
    d = (prediction.float() - target.float()).flatten(1)
    return d.abs().mean(1) if kind == "l1" else d.square().mean(1)


def robust(kind: Literal["cauchy", "geman_mcclure", "mean_huber"], squares: Tensor, c: float) -> Tensor:
    """rho(m; c), (B,), of each sample's mean m of squared differences, in float32 (arXiv 2502.01441).

    cauchy ln(1 + m / (2 c^2)), geman_mcclure 2 m / (m + 4 c^2), mean_huber sqrt(m + c^2) - c. The gradient in sqrt(m)
    of the first is 2 / sqrt(m) for m far above c^2, of the second 16 c^2 / sqrt(m)^3, of the third 1: the first two
    forget outliers. m is a mean: a sum over D elements would be c smaller by sqrt(D).
    """
    m = squares.float()
    if kind == "cauchy":
        return (m / (2 * c**2)).log1p()
    if kind == "geman_mcclure":
        return 2 * m / (m + 4 * c**2)
    return m / ((m + c**2).sqrt() + c)


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's mean relu(1 - D(real)) + mean relu(1 + D(fake)), in float32 (arXiv 1705.02894, eq. 3)."""
    return (1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(fake): the generator's side."""
    return -fake.float().mean()


def adaptive(squares: Tensor, p: float, c: float) -> Tensor:
    """D / sg((D + c)^p), (B,), of each sample's sum D of squared errors: p = 0 is D, p = 1 near 1 whatever D is.

    MeanFlow, arXiv 2505.13447, eq. 22; c belongs to a sum over all elements.
    """
    return squares / (squares.detach() + c) ** p


def unit_step(prediction: Tensor, step: Tensor, p: float, c: float, per_element: bool = False) -> Tensor:
    """|u - sg(u + g / (|g| + c)^p)|^2, (B,), for a wanted step g of the prediction u; gradient -2 g / (|g| + c)^p.

    FastGen's opt_grad. At p = 1 the gradient has about unit norm, as `adaptive` has at p = 0.5. per_element: g is
    first divided by the square root of its number of elements.
    """
    g = step.detach().double().flatten(1)
    if per_element:
        g = g / g.shape[1] ** 0.5
    g = g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + c) ** p
    u = prediction.double().flatten(1)
    return (u - (u.detach() + g)).square().sum(1)
