"""What a run may trade for memory: recomputed activations, another attention, networks that wait on the CPU."""

from typing import Any

import torch

from ..config.run import RunConfig
from ..diffusion.denoiser import Denoiser
from ..errors import UserError
from ..models.codec import Autoencoder
from ..models.teacher import LatentTeacher, Teacher
from .contract import Method


def save_memory(c: RunConfig, method: Method, teacher: Teacher | None) -> None:
    """Gradient checkpointing, xformers and torch.compile, where the configuration wants them."""
    modules = [*method.modules(), *method.passed_through()]
    networks: list[Any] = [m for m in modules if hasattr(m, "enable_gradient_checkpointing")]
    if c.gradient_checkpointing:
        for network in networks:
            network.enable_gradient_checkpointing()
    if c.enable_xformers_memory_efficient_attention:
        for network in networks:
            enable_xformers(network)
    if c.compile:
        denoisers = [m for m in method.modules() if isinstance(m, Denoiser)]
        denoisers += [teacher.denoiser] if teacher else []
        for network in dict.fromkeys(d.network for d in denoisers):
            network.compile()


def waiting(frozen: Teacher | Autoencoder | None) -> list[torch.nn.Module]:
    """What training does not call where latents and prompts are cached."""
    if isinstance(frozen, LatentTeacher):
        return [*frozen.text_encoders, frozen.vae]
    if isinstance(frozen, Autoencoder):
        return [frozen.vae]
    raise UserError("cpu_offload: there is no text encoder or autoencoder; leave it out")


def enable_xformers(network: Any) -> None:
    """diffusers' memory-efficient attention, or one line where xformers does not fit the installed torch."""
    key = "enable_xformers_memory_efficient_attention"
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{key}: xformers cannot run beside torch {torch.__version__} here ({reason}); "
            "install the xformers build for this torch on a GPU machine, or leave the key off"
        ) from error
