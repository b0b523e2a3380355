"""Classifier-free guidance. The scale g is 1 when guidance is off; latent consistency's embedding sees w = g - 1."""

import torch
from torch import Tensor

from .condition import Condition
from .denoiser import Denoiser
from .process import per_sample


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """unconditional + g (conditional - unconditional), g (B,) (arXiv 2207.12598)."""
    return unconditional + per_sample(scale, conditional) * (conditional - unconditional)


def guided_x0_eps(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x0 and eps of the guided teacher, both branches in one batch of 2B.

    Guidance is linear in the prediction, so guiding x0 and eps separately is the same for every prediction type.
    """
    both = denoiser(
        x_t.repeat(2, *[1] * (x_t.ndim - 1)), t.repeat(2), Condition.cat([condition, condition.null()])
    )
    x0, eps = both.x0.chunk(2), both.eps.chunk(2)
    return guided(x0[0], x0[1], scale), guided(eps[0], eps[1], scale)


def guided_velocity(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: Tensor
) -> Tensor:
    """dx_t/dt of the guided teacher, (B, ...)."""
    process = denoiser.process
    x0, eps = guided_x0_eps(denoiser, x_t, t, condition, scale)
    return per_sample(process.alpha_dot(t), x_t) * x0 + per_sample(process.sigma_dot(t), x_t) * eps


def guidance_embedding(w: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal embedding of w (B,), shape (B, dim): u = 1000 w, sines first (arXiv 2310.04378)."""
    half = dim // 2
    step = torch.tensor(10000.0, device=w.device).log() / (half - 1)  # rounded as diffusers rounds it
    frequency = torch.exp(torch.arange(half, device=w.device, dtype=torch.float32) * -step)
    angle = 1000 * w.float()[:, None] * frequency
    out = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.nn.functional.pad(out, (0, dim % 2))
