"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps, time running from data to noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import UserError


def per_sample(a: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) coefficients so that they broadcast against x (B, ...), in x's dtype."""
    return a.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class NoiseProcess(ABC):
    """alpha, sigma and their time derivatives as functions of t (B,), in float64.

    t_range: (smallest, largest) time of the process.
    """

    t_range: tuple[float, float]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """The t at which log(alpha^2/sigma^2) has this value; beyond the ends of t_range the nearer end."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2/sigma^2), (B,)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def share(self, u: Tensor) -> Tensor:
        """The time at the share u in [0, 1] of the way from data to noise, (B,)."""
        low, high = self.t_range
        return low + u.double() * (high - low)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) eps."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), eps) * eps

    def renoised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The state at t of a consistency function's output, which stands at the process's smallest time."""
        return self.noised(x, eps, t)

    def map_to(self, other: "NoiseProcess", x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state and time of `other` with the same signal-to-noise ratio.

        A ratio that `other` cannot reach is cut to the nearer end of its t_range; the state is scaled by
        alpha'/alpha at low and by sigma'/sigma at high noise, so that the dominating part keeps its size.
        """
        s = other.time_of(self.log_snr(t))
        noisy = self.sigma(t) > self.alpha(t)
        scale = torch.where(noisy, other.sigma(s) / self.sigma(t), other.alpha(s) / self.alpha(t))
        return per_sample(scale, x_t) * x_t, s


class VP(NoiseProcess):
    """Discrete variance-preserving process (DDPM, arXiv 2006.11239): alpha^2 = abar, sigma^2 = 1 - abar.

    t counts the network's training steps, 0 .. T-1; between them the log signal-to-noise ratio is interpolated
    linearly. abar (T,) decreases; below 2^-24 it is taken as that, as diffusers' Euler scheduler takes a final 0.

    ends_in_noise  whether the final abar is 0: no x0 follows from a noise prediction there
    """

    def __init__(self, abar: Tensor, betas: Mapping[str, Any] | None = None):
        """betas: keys of a scheduler's configuration that give this abar."""
        whole = bool(abar[-1] >= 2.0**-24)
        self.ends_in_noise, self.betas = bool(abar[-1] <= 0), betas if whole else None
        abar = abar.double().clamp(min=2.0**-24)
        self.table = abar.log() - (-abar).log1p()
        self.abar = abar
        self.t_range = (0.0, float(len(abar) - 1))

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> "VP":
        """From any diffusers scheduler config that defines betas (beta_schedule, beta_start, beta_end)."""
        if "beta_schedule" not in config and config.get("trained_betas") is None:
            name = config.get("_class_name", "scheduler")
            raise UserError(
                f"teacher: {name} has no beta_schedule; a variance-preserving teacher is needed here"
            )
        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        chosen = {k: config[k] for k in (*keys, "rescale_betas_zero_snr") if config.get(k) is not None}
        try:
            scheduler = DDPMScheduler(**chosen)
        except NotImplementedError:
            raise UserError(
                f"teacher: its scheduler has beta_schedule {config['beta_schedule']}, which is not known here; give "
                "trained_betas"
            ) from None
        return cls(scheduler.alphas_cumprod, {k: scheduler.config[k] for k in keys})

    def scheduler_keys(self) -> dict[str, Any]:
        """Keys of a scheduler's configuration that give this process: those that it was read from, else every beta."""
        if self.betas is not None:
            return dict(self.betas)
        before = torch.cat([torch.ones_like(self.abar[:1]), self.abar[:-1]])
        return {"num_train_timesteps": len(self.abar), "trained_betas": (1 - self.abar / before).tolist()}

    def log_snr(self, t: Tensor) -> Tensor:
        low, weight = self._cell(t)
        table = self._table_on(t.device)
        return torch.lerp(table[low], table[low + 1], weight)

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * self._slope(t) * self.alpha(t) * self.sigma(t).square()

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -0.5 * self._slope(t) * self.sigma(t) * self.alpha(t).square()

    def time_of(self, log_snr: Tensor) -> Tensor:
        rising = self._table_on(log_snr.device).flip(0)
        wanted = log_snr.double().clamp(rising[0], rising[-1]).contiguous()
        high = torch.searchsorted(rising, wanted).clamp(1, len(rising) - 1)
        weight = (wanted - rising[high - 1]) / (rising[high] - rising[high - 1])
        return len(rising) - 1 - (high - 1 + weight)

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        low = t.floor().clamp(0, len(self.table) - 2).long()
        return low, t - low

    def _slope(self, t: Tensor) -> Tensor:
        low, _ = self._cell(t)
        table = self._table_on(t.device)
        return table[low + 1] - table[low]

    def _table_on(self, device: torch.device) -> Tensor:
        """The table, moved once: a step on an accelerator waits for no copy."""
        if self.table.device != device:
            self.table = self.table.to(device)
        return self.table


class EDM(NoiseProcess):
    """Variance-exploding process of EDM (arXiv 2206.00364, table 1): alpha = 1, sigma(t) = t.

    sigma_data is the standard deviation of the data per element, which preconditioning needs; rho bends `grid`.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, rho: float = 7.0
    ):
        assert 0 < sigma_min < sigma_max and sigma_data > 0 and rho > 0
        self.sigma_data, self.rho = sigma_data, rho
        self.t_range = (sigma_min, sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def share(self, u: Tensor) -> Tensor:
        """Even in sigma^(1/rho)."""
        low, high = (s ** (1 / self.rho) for s in self.t_range)
        return (low + u.double() * (high - low)) ** self.rho

    def renoised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x + sqrt(t^2 - sigma_min^2) eps (arXiv 2303.01469, algorithm 1)."""
        return x + per_sample((t.double().square() - self.t_range[0] ** 2).clamp(min=0).sqrt(), eps) * eps

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr.double()).clamp(*self.t_range)

    def grid(self, num_points: int) -> Tensor:
        """sigma_1 = sigma_min < ... < sigma_N = sigma_max, even in sigma^(1/rho) (eq. 5), (N,) in float64."""
        low, high = (s ** (1 / self.rho) for s in self.t_range)
        out = torch.linspace(low, high, num_points, dtype=torch.float64) ** self.rho
        out[0], out[-1] = self.t_range
        return out

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in (B,) of D(x, sigma) = c_skip x + c_out F(c_in x, .) (table 1)."""
        sigma, sd = sigma.double(), self.sigma_data
        norm = (sigma.square() + sd**2).sqrt()
        return sd**2 / norm.square(), sigma * sd / norm, 1 / norm


class RectifiedFlow(NoiseProcess):
    """Straight paths from data at t = 0 to noise at t = 1 (arXiv 2209.03003): alpha = 1 - t, sigma = t."""

    t_range = (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t, dtype=torch.float64)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr.double())


class TrigFlow(NoiseProcess):
    """x_t = cos(t) x0 + sigma_data sin(t) eps from data at t = 0 to noise at t = pi/2 (sCM, arXiv 2410.11081).

    sigma_data is the standard deviation of the data per element; the velocity dx_t/dt is sigma_data F of the paper.
    """

    t_range = (0.0, math.pi / 2)

    def __init__(self, sigma_data: float = 1.0):
        assert sigma_data > 0
        self.sigma_data = sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return t.double().cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.double().sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -t.double().sin()

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.double().cos()

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * log_snr.double()) / self.sigma_data)
