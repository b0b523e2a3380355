"""Consistency functions: a denoiser with a boundary condition, f(x, t_min) = x."""

from torch import Tensor, nn

from .condition import Condition
from .denoiser import Denoiser
from .process import per_sample


def lcm_boundary(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip, c_out (B,) of latent consistency models, s = timestep_scaling * t (arXiv 2310.04378, appendix).

    The identity at t = 0; already at t = 19 of 1000, c_skip is 7e-6.
    """
    s = timestep_scaling * t.double()
    norm = s.square() + sigma_data**2
    return sigma_data**2 / norm, s / norm.sqrt()


class ConsistencyFunction(nn.Module):
    """f(x_t, t) = c_skip(t) x_t + c_out(t) x0(x_t, t). The denoiser's raw network is what is exported."""

    def __init__(self, denoiser: Denoiser, timestep_scaling: float = 10.0):
        super().__init__()
        self.denoiser, self.timestep_scaling = denoiser, timestep_scaling

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, *, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        c_skip, c_out = lcm_boundary(t, self.timestep_scaling)
        x0 = self.denoiser(x_t, t, condition, weights=weights).x0
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * x0
