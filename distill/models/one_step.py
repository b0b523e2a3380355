"""ControlNets beside a frozen network: a generator of one step, or a denoiser of many."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from ...pipelines.export import sampling_of
from ..diffusion.condition import Condition
from ..diffusion.consistency import ConsistencyFunction, lcm_boundary
from ..diffusion.denoiser import Denoiser
from ..diffusion.guidance import guidance_embedding
from ..errors import UserError
from .network_adapters import denoiser_of, nested
from .stock_schedulers import lcm_scheduler
from .teacher import LatentTeacher, locate

DEFAULT_GUIDANCE = 8.5  # of LatentConsistencyModelPipeline
EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of a ControlNet's condition; each but the first halves its side


class OneStep:
    """x0 of noise in one evaluation of the teacher's network, as LCMScheduler steps at `timestep`.

    The time, and the scale that a guidance-embedding network is told, are those of the folder's own call of one step
    where its sampling.json has one; else the last training time and the pipeline's default. Parameters are frozen,
    gradients pass through to an adapter.
    """

    def __init__(self, teacher: LatentTeacher, timestep: int | None, guidance_scale: float | None):
        self.teacher, self.process = teacher, teacher.noise
        self.network = teacher.family.network
        call = sampling_of(Path(locate(teacher.path))).get("1", {})
        total = len(self.process.abar)
        self.timestep = int((call.get("timesteps") or [total - 1])[0]) if timestep is None else timestep
        if self.timestep >= total:
            raise UserError(f"method.timestep: {self.timestep} is not below {total}, the teacher's last time")
        self.guidance_dim, self.guidance_scale = told_guidance(self.network, call, guidance_scale)
        self.scheduler, self.function = consistency_of(teacher)

    def __call__(self, noise: Tensor, told: Condition) -> Tensor:
        """Latents (B, C, h, w)."""
        t = self.times(noise)
        if self.guidance_dim is not None:
            w = torch.full_like(t, self.guidance_scale - 1)
            told = told.with_(timestep_cond=guidance_embedding(w, self.guidance_dim))
        return self.function(noise, t, told)

    def times(self, noise: Tensor) -> Tensor:
        """The time of the step, (B,)."""
        return torch.full((len(noise),), float(self.timestep), dtype=torch.float64, device=noise.device)

    def through(self, network: Any) -> "OneStep":
        """The same step of another network of this kind."""
        other, old = copy.copy(self), self.function
        denoiser = denoiser_of(network, old.denoiser.process, old.denoiser.kind)
        other.network, other.function = network, ConsistencyFunction(denoiser, old.boundary)
        return other

    def call(self) -> dict[str, Any]:
        """Arguments of a stock pipeline's call that give the same step."""
        return {
            "timesteps": [self.timestep],
            "guidance_scale": self.guidance_scale,
            **self.teacher.call(),
        }


def told_guidance(
    network: Any, call: dict[str, Any], guidance_scale: float | None
) -> tuple[int | None, float]:
    """Width of a network's embedding of the guidance scale, and the scale that it is told: the one given, that of
    `call`, or the pipeline's default; None and 1 without an embedding."""
    width = network.config.get("time_cond_proj_dim")
    if width is None:
        if guidance_scale is not None:
            raise UserError(
                "method.guidance_scale: the generator has no embedding of it, and no other guidance is given here; "
                "leave the key out"
            )
        return None, 1.0
    own = call.get("guidance_scale", DEFAULT_GUIDANCE)
    return width, float(own if guidance_scale is None else guidance_scale)


def consistency_of(teacher: LatentTeacher) -> tuple[LCMScheduler, ConsistencyFunction]:
    """The function that LCMScheduler steps with for this network, and that scheduler."""
    config = teacher.pipeline.scheduler.config
    own = {k: config[k] for k in ("timestep_scaling", "original_inference_steps") if k in config}
    scheduler = lcm_scheduler(teacher.noise, teacher.denoiser.kind, **own)
    scaling = scheduler.config.timestep_scaling
    return scheduler, ConsistencyFunction(teacher.denoiser, lambda t: lcm_boundary(t, scaling))


class ControlledDenoiser(Denoiser):
    """A denoiser beside a ControlNet that is shown `picture` (B, 3, H, W), again for every further B rows."""

    def __init__(self, denoiser: Denoiser, controlnet: ControlNetModel, picture: Tensor):
        super().__init__(denoiser.network, denoiser.process, denoiser.kind)
        self.denoiser, self.controlnet, self.picture = denoiser, controlnet, picture

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        picture = self.picture.repeat(len(x_t) // len(self.picture), 1, 1, 1)
        added = residuals(self.controlnet, x_t, t, condition, picture)
        return self.denoiser.call(x_t, t, r, condition.with_(**added))


def residuals(
    controlnet: ControlNetModel, x_t: Tensor, t: Tensor, told: Condition, picture: Tensor | None
) -> dict[str, Any]:
    """What a ControlNet adds to its U-Net, as arguments of that network's call."""
    dtype = controlnet.dtype
    down, mid = controlnet(
        x_t.to(dtype),
        t.to(torch.float32),
        controlnet_cond=picture,
        **nested({k: v for k, v in told.to(dtype).arguments.items() if k != "timestep_cond"}),
        return_dict=False,
    )
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


def controlnet_of(teacher: LatentTeacher) -> ControlNetModel:
    """A float32 ControlNet of the teacher's U-Net: a copy of its encoder behind convolutions that start at zero.

    ControlNets embed no guidance scale: the copy of a network that does leaves that layer out.
    """
    network = teacher.family.network
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"teacher.path: {teacher.path} has a {type(network).__name__}; ControlNets here need a U-Net"
        )
    halvings = len(teacher.vae.config.block_out_channels)
    if halvings > len(EMBEDDING_CHANNELS):
        raise UserError(f"teacher.path: latents of {teacher.path} are smaller than a ControlNet's condition")
    return ControlNetModel.from_unet(
        without_guidance(network), conditioning_embedding_out_channels=EMBEDDING_CHANNELS[:halvings]
    ).float()


def without_guidance(network: Any) -> Any:
    """The same U-Net, or a copy without an embedding of the guidance scale."""
    if network.config.time_cond_proj_dim is None:
        return network
    plain = type(network).from_config({**network.config, "time_cond_proj_dim": None})
    kept = {k: v for k, v in network.state_dict().items() if not k.startswith("time_embedding.cond_proj.")}
    plain.load_state_dict(kept)
    return plain
