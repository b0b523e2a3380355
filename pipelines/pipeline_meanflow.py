"""MeanFlow sampling of pixels or latents, with class labels or none; one file for trust_remote_code=True."""

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class MeanFlowPipeline(DiffusionPipeline):
    """z_r = z_t - (t - r) u(z_t, r, t) (arXiv 2505.13447, eq. 12); t = 0 is the data, t = 1 the noise.

    unet      gives the mean velocity u; it takes t and t - r as they are, not times 1,000: a UNet2DModel the latter as
              class_labels (class_embed_type "timestep"), a TwoTimeDiT as span, with labels beside it
    vae       of a network that works in latents
    t_max     where sampling starts
    guidance  effective scale and interval of t that were trained into u; nothing is added here
    """

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
        t_max: float = 1.0,
        guidance: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(t_max=t_max, guidance=guidance)
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """`batch_size` pictures.

        class_labels (batch_size,): for a class-conditional network, drawn at random where they are left out.
        sigmas: decreasing times in place of num_inference_steps even ones from t_max; the last step ends at 0.
        """
        config, device = self.unet.config, self._execution_device
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        labels = self._labels(batch_size, class_labels, generator, device)
        if sigmas is None:
            sigmas = [self.config.t_max * (1 - i / num_inference_steps) for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        times = self.scheduler.sigmas.to(device)
        x = times[0] * x
        for i, step in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t, h = times[i].expand(batch_size), (times[i] - times[i + 1]).expand(batch_size)
            x = self.scheduler.step(self.mean_velocity(x, t, h, labels), step, x, return_dict=False)[0]
        if output_type != "latent":
            if self.vae is not None:
                z = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
                x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            x = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    def mean_velocity(
        self, x: torch.Tensor, t: torch.Tensor, h: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """u(x, t - h, t), (B, C, H, W)."""
        if self.unet.config.get("class_embed_type") == "timestep":
            return self.unet(x, t, class_labels=h, return_dict=False)[0]
        return self.unet(x, t, span=h, class_labels=labels, return_dict=False)[0]

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
