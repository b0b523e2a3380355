"""A flow-match scheduler with noise levels of its own; one file that diffusers loads with trust_remote_code=True."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config


class FewSigmasScheduler(FlowMatchEulerDiscreteScheduler):
    """n steps take the first n of `few_sigmas`, for pipelines whose call has no `sigmas` (WanPipeline).

    few_sigmas: decreasing, in (0, 1]. stochastic_sampling: each step predicts the data and adds new noise.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        stochastic_sampling: bool = True,
        few_sigmas: tuple[float, ...] = (1.0,),
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps, shift=shift, stochastic_sampling=stochastic_sampling
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        **kwargs,
    ) -> None:
        """Raises ValueError for more steps than there are noise levels."""
        own = list(self.config.few_sigmas)
        if sigmas is None:
            if num_inference_steps is None or not 1 <= num_inference_steps <= len(own):
                raise ValueError(f"num_inference_steps {num_inference_steps} is not in 1..{len(own)}")
            sigmas = own[:num_inference_steps]
        super().set_timesteps(sigmas=sigmas, device=device, **kwargs)
