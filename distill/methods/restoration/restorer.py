"""A frozen few-step text student as a restorer: the degraded picture as an intermediate state (arXiv 2502.02215)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from ....pipelines.export import sampling_of
from ...diffusion.condition import Condition
from ...diffusion.consistency import ConsistencyFunction
from ...diffusion.generator import Generator, lcm_timesteps
from ...diffusion.guidance import guidance_embedding
from ...errors import UserError
from ...models.one_step import ControlledDenoiser, consistency_of, told_guidance
from ...models.teacher import LatentTeacher, locate

ORIGINAL_STEPS = 50  # of LCMScheduler


class Restorer:
    """The latent z of a degraded picture stands for the x0 of step start_index - 1, which no network computes.

    x_t = alpha(t) z + sigma(t) n at t = timesteps[start_index] > 0, n fresh; then the remaining steps, as LCMScheduler
    takes them. The later the start, the closer the output to the picture.

    timesteps       of the whole schedule: given, else those of the folder's own call of num_steps, else LCMScheduler's
    guidance_scale  that a network with an embedding of it is told: given, else that call's, else the pipeline's default
    """

    def __init__(
        self,
        teacher: LatentTeacher,
        num_steps: int = 4,
        *,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
    ):
        self.teacher, total = teacher, len(teacher.noise.abar)
        call = sampling_of(Path(locate(teacher.path))).get(str(num_steps), {})
        own = call.get("timesteps") or lcm_timesteps(num_steps, ORIGINAL_STEPS, total)
        self.timesteps = [int(t) for t in (own if timesteps is None else timesteps)]
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if len(self.timesteps) < 2 or not falling or self.timesteps[0] >= total or self.timesteps[-1] < 0:
            raise UserError(
                f"method.timesteps: {self.timesteps} are not two or more falling times below {total}; name such"
            )
        network = teacher.family.network
        self.guidance_dim, self.guidance_scale = told_guidance(network, call, guidance_scale)
        self.scheduler, self.function = consistency_of(teacher)

    def check(self, start_index: int, key: str = "method.start_index") -> None:
        if not 1 <= start_index < len(self.timesteps):
            raise UserError(
                f"{key}: {start_index} is not in 1..{len(self.timesteps) - 1}: step 0 is the degraded picture"
            )

    def told(self, condition: Condition) -> Condition:
        """The condition with the embedding of the guidance scale."""
        if self.guidance_dim is None:
            return condition
        w = torch.full((len(condition),), self.guidance_scale - 1)
        embedded = guidance_embedding(w, self.guidance_dim)
        return condition.with_(timestep_cond=embedded.to(next(iter(condition.arguments.values())).device))

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """z (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]: the mean of the autoencoder's posterior."""
        return self.teacher.mean_latents(self.teacher.posterior(images))

    def start(self, z: Tensor, noise: Tensor, start_index: int) -> Tensor:
        """The state at timesteps[start_index]."""
        t = torch.full((len(z),), float(self.timesteps[start_index]), dtype=torch.float64, device=z.device)
        return self.teacher.noise.noised(z, noise, t)

    def __call__(
        self,
        z: Tensor,
        condition: Condition,
        fresh: Callable[[Tensor], Tensor],
        start_index: int,
        controlnet: ControlNetModel | None = None,
        picture: Tensor | None = None,
    ) -> Tensor:
        """Restored latents, with gradients of every step; picture (B, 3, H, W) is what the ControlNet sees.

        fresh(x) gives unit noise like x, once for the start and once between two steps.
        """
        function = self.function
        if controlnet is not None:
            assert picture is not None
            steered = ControlledDenoiser(function.denoiser, controlnet, picture)
            function = ConsistencyFunction(steered, function.boundary)
        generator = Generator(function, self.timesteps, grad_steps="all")
        return generator(
            self.start(z, fresh(z), start_index), self.told(condition), fresh, start_index=start_index
        )

    def call(self, start_index: int) -> dict[str, Any]:
        """Arguments of RestorationPipeline's call that give the same."""
        return {
            "timesteps": self.timesteps,
            "start_index": start_index,
            "guidance_scale": self.guidance_scale,
        }
