"""Heun's sampler for EDM-preconditioned pixel networks; one file that diffusers loads with trust_remote_code=True."""

from itertools import pairwise

import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class EDMPipeline(DiffusionPipeline):
    """Deterministic sampling of arXiv 2206.00364, algorithm 1, with a UNet2DModel F.

    D(x, sigma) = c_skip x + c_out F(c_in x, 250 ln sigma), c_* of its table 1. The scheduler only holds sigma_min,
    sigma_max, sigma_data and rho; its own rule, consistency sampling, is not used.
    """

    def __init__(self, unet: UNet2DModel, scheduler: CMStochasticIterativeScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int = 18,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """`batch_size` pictures in 2 num_inference_steps - 1 evaluations of the network.

        class_labels (batch_size,): needed by a class-conditional network, drawn at random where they are left out.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps}: give 1 or more")
        config, device = self.unet.config, self._execution_device
        labels = self._labels(batch_size, class_labels, device)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        sigmas = self.sigmas(num_inference_steps)
        x = x * sigmas[0]
        for high, low in self.progress_bar(list(pairwise(sigmas))):
            slope = (x - self.denoised(x, high, labels)) / high
            ahead = x + (low - high) * slope
            if low > 0:
                second = (ahead - self.denoised(ahead, low, labels)) / low
                ahead = x + (low - high) * (slope + second) / 2
            x = ahead
        images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def sigmas(self, num_steps: int) -> list[float]:
        """num_steps + 1 decreasing noise levels: eq. 5, then 0."""
        c = self.scheduler.config
        high, low = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        share = [i / max(num_steps - 1, 1) for i in range(num_steps)]
        return [(high + s * (low - high)) ** c.rho for s in share] + [0.0]

    def denoised(self, x: torch.Tensor, sigma: float, labels: torch.Tensor | None) -> torch.Tensor:
        """D(x, sigma), (B, C, H, W)."""
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out = (float(c) for c in self.scheduler.get_scalings(level))
        c_in = float((level**2 + self.scheduler.config.sigma_data**2) ** -0.5)
        time = torch.full((len(x),), float(250 * level.log()), device=x.device)
        output = self.unet(c_in * x, time, class_labels=labels, return_dict=False)[0]
        return c_skip * x + c_out * output

    def _labels(
        self, batch_size: int, labels: torch.Tensor | list[int] | int | None, device: torch.device
    ) -> torch.Tensor | None:
        count = self.unet.config.num_class_embeds
        if count is None:
            if labels is not None:
                raise ValueError("class_labels: this network is unconditional; leave them out")
            return None
        if labels is None:
            return torch.randint(count, (batch_size,)).to(device)
        out = torch.as_tensor(labels, dtype=torch.long, device=device).reshape(-1)
        if len(out) != batch_size:
            raise ValueError(f"class_labels: {len(out)} given for a batch of {batch_size}")
        return out
