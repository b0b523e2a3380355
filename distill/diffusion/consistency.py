"""Consistency functions: a denoiser with a boundary condition, f(x, t_min) = x."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .condition import Condition
from .denoiser import Denoiser
from .process import EDM, per_sample


def lcm_boundary(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip, c_out (B,) of latent consistency models, s = timestep_scaling * t (arXiv 2310.04378, appendix).

    The identity at t = 0; already at t = 19 of 1000, c_skip is 7e-6.
    """
    s = timestep_scaling * t.double()
    norm = s.square() + sigma_data**2
    return sigma_data**2 / norm, s / norm.sqrt()


def edm_scalings(sigma: Tensor, process: EDM) -> tuple[Tensor, Tensor]:
    """c_skip, c_out (B,) of f = c_skip x + c_out F with f(x, sigma_min) = x (arXiv 2303.01469, appendix C).

    c_skip has sigma - sigma_min in its denominator, c_out in its numerator alone.
    """
    sigma, sd = sigma.double(), process.sigma_data
    rest = sigma - process.t_range[0]
    return sd**2 / (rest.square() + sd**2), rest * sd / (sigma.square() + sd**2).sqrt()


def edm_boundary(sigma: Tensor, process: EDM) -> tuple[Tensor, Tensor]:
    """The same f written with x0 = D(x, sigma) in place of F, so that any denoiser can be trained: f = a x + b D, (B,).

    F = (D - c_skip' x) / c_out' with EDM's own c_skip', c_out' gives b = (sigma - sigma_min) / sigma and
    a = c_skip - b c_skip'; exactly 1 and 0 at sigma_min.
    """
    b = (sigma.double() - process.t_range[0]) / sigma.double()
    return edm_scalings(sigma, process)[0] - b * process.scalings(sigma)[0], b


def no_boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """f = x0: for a denoiser that is the identity at t = 0 by itself, as one of TrigFlow is."""
    return torch.zeros_like(t), torch.ones_like(t)


class ConsistencyFunction(nn.Module):
    """f(x_t, t) = a(t) x_t + b(t) x0(x_t, t), (a, b) = boundary(t). The denoiser's raw network is what is exported."""

    def __init__(
        self, denoiser: Denoiser, boundary: Callable[[Tensor], tuple[Tensor, Tensor]] = lcm_boundary
    ):
        super().__init__()
        self.denoiser, self.boundary = denoiser, boundary

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, *, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        a, b = self.boundary(t)
        x0 = self.denoiser(x_t, t, condition, weights=weights).x0
        return per_sample(a, x_t) * x_t + per_sample(b, x_t) * x0
