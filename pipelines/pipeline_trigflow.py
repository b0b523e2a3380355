"""Consistency sampling in TrigFlow, of pixels or latents, by class or not; one file for trust_remote_code=True."""

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SCMScheduler,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class TrigFlowPipeline(DiffusionPipeline):
    """x0 = cos(t) x - sigma_data sin(t) F(x / sigma_data, t), with fresh noise between the steps (arXiv 2410.11081).

    unet      gives F and is told t; with prediction "edm" it gives -F and is told 250 ln(sigma_data tan t), as a
              network of EDM (arXiv 2206.00364) is
    vae       of a network that works in latents
    times     decreasing, those of the first steps are taken; t = pi/2 is the noise
    """

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SCMScheduler,
        vae: AutoencoderKL | None = None,
        prediction: str = "trigflow",
        times: tuple[float, ...] = (1.5645, 1.1),
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(prediction=prediction, times=list(times))
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int = 1,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """`batch_size` pictures.

        class_labels (batch_size,): for a class-conditional network, drawn at random where they are left out.
        timesteps: decreasing times in place of the first num_inference_steps of the configuration's.
        """
        config, device = self.unet.config, self._execution_device
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        scale = self.scheduler.config.sigma_data
        x = scale * randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        labels = self._labels(batch_size, class_labels, generator, device)
        times = list(self.config.times)[:num_inference_steps] if timesteps is None else list(timesteps)
        self.scheduler.set_timesteps(
            len(times), [*times, 0.0], device, max_timesteps=None, intermediate_timesteps=None
        )
        x0 = x
        for t in self.progress_bar(self.scheduler.timesteps[:-1]):
            f = self.output(x / scale, t.expand(batch_size).double(), scale, labels)
            x, x0 = self.scheduler.step(scale * f, t, x, generator=generator, return_dict=False)
        x = x0
        if output_type != "latent":
            if self.vae is not None:
                z = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
                x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            x = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    def output(
        self, x: torch.Tensor, t: torch.Tensor, scale: float, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """F, (B, C, H, W)."""
        edm = self.config.prediction == "edm"
        told = (250 * (scale * t.tan()).log() if edm else t).float()
        one_time = isinstance(self.unet, UNet2DModel)
        span: dict[str, Any] = {} if one_time else {"span": torch.zeros_like(told)}
        out = self.unet(x, told, class_labels=labels, return_dict=False, **span)[0]
        return -out if edm else out

    def _labels(
        self,
        batch_size: int,
        labels: torch.Tensor | list[int] | int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor | None:
        count = self.unet.config.num_class_embeds
        if count is None:
            if labels is not None:
                raise ValueError("class_labels: this network is unconditional; leave them out")
            return None
        if labels is None:
            each = generator if isinstance(generator, list) else [generator] * batch_size
            drawn = [torch.randint(count, (1,), generator=g, device=g.device if g else "cpu") for g in each]
            return torch.cat([label.to(device) for label in drawn])
        out = torch.as_tensor(labels, dtype=torch.long, device=device).reshape(-1)
        if len(out) != batch_size:
            raise ValueError(f"class_labels: {len(out)} given for a batch of {batch_size}")
        return out
