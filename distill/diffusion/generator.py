"""Sampling rules unrolled: (noise, condition) -> x0, with our own arithmetic and diffusers' order of random draws."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .condition import Condition
from .consistency import ConsistencyFunction
from .denoiser import Denoiser
from .guidance import guided_x0_eps
from .process import VP
from .solvers import ddim_step


def seeded(count: int, seed: int) -> list[torch.Generator]:
    """One CPU generator per image: seed, seed + 1, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def lcm_timesteps(
    num_steps: int, original_steps: int = 50, num_train_timesteps: int = 1000, power: float = 1.0
) -> list[int]:
    """`chosen_times` among `original_steps` evenly spaced ones; power 1 is LCMScheduler's choice."""
    k = num_train_timesteps // original_steps
    return chosen_times([(i + 1) * k - 1 for i in range(original_steps)], num_steps, power)


def chosen_times(grid: Sequence[int], num_steps: int, power: float = 1.0) -> list[int]:
    """Decreasing times out of an increasing grid, dense towards the data for power > 1.

    Step i of n stands at the fraction (1 - i/n)^power of the way from the data. Raises ValueError if num_steps do not
    fit.
    """
    total, falling = len(grid), list(grid)[::-1]
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps {num_steps} is not in 1..{total}")
    if power == 1:
        return [falling[i * total // num_steps] for i in range(num_steps)]
    fractions = [1 - (1 - i / num_steps) ** power for i in range(num_steps)]
    times = [falling[int(total * f + 1e-9)] for f in fractions]
    if len(set(times)) < num_steps:
        raise ValueError(f"num_steps {num_steps}: power {power} puts two of them on one of {total} times")
    return times


class Generator:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1) with fresh noise between the steps.

    times      decreasing, numbers or (B,); the first is where the noise enters unless `start_index` says otherwise
    grad_steps "last", "all" or "none": through which steps gradients flow
    """

    def __init__(
        self, function: ConsistencyFunction, times: Sequence[float | Tensor], grad_steps: str = "none"
    ):
        if grad_steps not in ("last", "all", "none"):
            raise ValueError(f"grad_steps {grad_steps!r} is not last, all or none")
        self.function, self.times, self.grad_steps = function, list(times), grad_steps

    def __call__(
        self,
        noise: Tensor,
        condition: Condition,
        fresh: Callable[[Tensor], Tensor],
        *,
        start_index: int = 0,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """noise (B, C, h, w): the state at times[start_index]; `fresh(x)` gives unit noise like x. Returns x0."""
        process = self.function.denoiser.process
        x_t, x0 = noise, noise
        for i in range(start_index, len(self.times)):
            last = i == len(self.times) - 1
            graded = torch.is_grad_enabled() and (
                self.grad_steps == "all" or (self.grad_steps == "last" and last)
            )
            t = self._at(i, noise)
            with torch.set_grad_enabled(graded):
                x0 = self.function(x_t, t, condition, weights=weights)
                if not last:
                    x_t = process.renoised(x0, fresh(x0), self._at(i + 1, noise))
        return x0

    def _at(self, index: int, noise: Tensor) -> Tensor:
        """(B,) in float64."""
        time = torch.as_tensor(self.times[index], dtype=torch.float64, device=noise.device)
        return time.expand(len(noise))


def fresh_from(generators: list[torch.Generator]) -> Callable[[Tensor], Tensor]:
    """Noise drawn row by row from the images' own generators, as diffusers' schedulers draw it."""
    return lambda x: randn_tensor(x.shape, generator=generators, device=x.device, dtype=x.dtype)


def mean_velocity_sample(
    denoiser: Denoiser, noise: Tensor, condition: Condition, times: Sequence[float]
) -> Tensor:
    """z_r = z_t - (t - r) u(z_t, r, t) along `times` (arXiv 2505.13447, eq. 12), from unit noise times the first.

    In float32, as FlowMatchEulerDiscreteScheduler steps.
    """
    sigmas = torch.tensor(times, dtype=torch.float32, device=noise.device)
    z = sigmas[0] * noise
    for t, r in pairwise(sigmas):
        u = denoiser(z, t.expand(len(z)).double(), condition, r=r.expand(len(z)).double()).velocity
        z = z + (r - t) * u
    return z


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    shape: Sequence[int],
    condition: Condition,
    num_steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
    *,
    to_data: bool = True,
) -> Tensor:
    """Guided DDIM from unit noise on trailing times T-1, T-1 - T/n, ...; (B, *shape).

    to_data: the last step ends at x0, else at the process's first time (DDIMScheduler's set_alpha_to_one).
    """
    process = denoiser.process
    assert isinstance(process, VP)
    device = next(denoiser.parameters()).device
    x_t = randn_tensor((len(generators), *shape), generator=generators, device=device)
    total = len(process.abar)
    times = [round(total - i * total / num_steps) - 1 for i in range(num_steps)]
    scale = torch.full((len(x_t),), float(guidance_scale), device=device)
    x0 = x_t
    for i, time in enumerate(times):
        t = torch.full((len(x_t),), float(time), dtype=torch.float64, device=device)
        x0, eps = guided_x0_eps(denoiser, x_t, t, condition, scale)
        if i + 1 < num_steps or not to_data:
            following = times[i + 1] if i + 1 < num_steps else 0
            x_t = ddim_step(x0, eps, process, torch.full_like(t, float(following)))
    return x0 if to_data else x_t


def ends_at_data(scheduler: Any) -> bool:
    """Whether a scheduler's last step gives x0; with set_alpha_to_one or final_sigmas_type off it ends at the first
    training step."""
    config = scheduler.config
    return bool(config.get("set_alpha_to_one", True)) and config.get("final_sigmas_type", "zero") == "zero"
