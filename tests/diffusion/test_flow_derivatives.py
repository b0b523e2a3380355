"""Velocities of SD3, Flux and Wan transformers: forward-mode derivatives, and gradients with checkpointing."""

from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.derivative import total_derivative
from fewstep.distill.diffusion.process import RectifiedFlow
from fewstep.distill.models.network_adapters import ADAPTERS, denoiser_of
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..tiny_families import flux_network, sd3_network, wan_network

NETWORKS = {"sd3": sd3_network, "flux": flux_network, "wan": wan_network}


class Double(TorchFunctionMode):
    """Casts to float32 go to float64 instead: the networks' own casts would drown a difference quotient."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **(kwargs or {}))


def built(name: str) -> tuple[Denoiser, Condition]:
    network = NETWORKS[name]().double()
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape))
    told = {"encoder_hidden_states": torch.randn(2, 5, 32)}
    if name != "wan":
        told["pooled_projections"] = torch.randn(2, network.config.pooled_projection_dim)
    if name == "flux":
        told["guidance"] = torch.tensor([3.5, 1.0])
    return denoiser_of(network, RectifiedFlow(), "velocity"), Condition(told, {}).to(torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_is_the_difference_quotient(name: str) -> None:
    """Along (v, 1) in (x_t, t), in float64: with our attention, torch's explicit one, and by two reverse passes."""
    denoiser, told = built(name)
    denoiser.requires_grad_(False)
    z, v = torch.randn(2, 2, 4, 4, 6, dtype=torch.float64)
    t, h = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return denoiser(z, t, told).velocity

    r = torch.zeros_like(t)
    with Double(), torch.no_grad():
        quotient = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
        kernel = total_derivative(u, z, r, t, v, by="kernel")
        others = [total_derivative(u, z, r, t, v, by=b) for b in ("math", "double_backward")]
        still = total_derivative(u, z, r, t, torch.zeros_like(v), by="kernel")
    assert relative(kernel, quotient) < 1e-5
    assert max(relative(other, kernel) for other in others) < 1e-10
    assert relative(still, kernel) > 0.01  # the state's part counts
    assert still.norm() > 0.1  # and so does the time's
    single = total_derivative(u, z, r, t, v, by="kernel")
    assert relative(single, kernel) < 1e-3  # with the networks' casts


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_with_checkpointing(name: str) -> None:
    denoiser, told = built(name)
    denoiser.float()
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8])

    def gradients() -> dict[str, Tensor]:
        denoiser.zero_grad()
        denoiser(x, t, told).velocity.square().sum().backward()
        return {k: p.grad.clone() for k, p in denoiser.named_parameters() if p.grad is not None}

    plain, calls = gradients(), []
    denoiser.network.enable_gradient_checkpointing()
    original = denoiser.network._gradient_checkpointing_func
    denoiser.network._gradient_checkpointing_func = lambda *a: calls.append(1) or original(*a)
    saving = gradients()
    assert calls and plain.keys() == saving.keys() == dict(denoiser.named_parameters()).keys()
    assert all(torch.allclose(saving[k], plain[k], rtol=1e-4, atol=1e-5) for k in plain)


def test_every_network_can_be_checkpointed() -> None:
    assert all(cls._supports_gradient_checkpointing for cls in ADAPTERS if issubclass(cls, ModelMixin))
