"""Consistency sampling in latents, with class labels or none; one file for trust_remote_code=True."""

from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ClassLatentCMPipeline(DiffusionPipeline):
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1) in an autoencoder's latents.

    unet        gives EDM's F(c_in x, 250 ln sigma): a UNet2DModel or what is called like one
    scheduler   noise levels and boundary condition, in latents of unit order
    statistics  a LatentStatistics, of a network trained on normalised latents
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar[list[str]] = ["statistics"]

    def __init__(
        self,
        unet: ModelMixin,
        vae: AutoencoderKL,
        scheduler: CMStochasticIterativeScheduler,
        statistics: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, statistics=statistics)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """`batch_size` pictures.

        class_labels (batch_size,): for a class-conditional network, drawn at random where they are left out.
        timesteps: decreasing indices into the scheduler's noise levels, 0 being the highest, in place of even ones.
        """
        config, device = self.unet.config, self._execution_device
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        x = x * self.scheduler.init_noise_sigma
        labels = self._labels(batch_size, class_labels, generator, device)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t)
            output = self.unet(scaled, t.expand(batch_size), class_labels=labels, return_dict=False)[0]
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        if output_type == "latent":
            images = x
        else:
            z = x if self.statistics is None else self.statistics.restored(x)
            z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
            images = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
