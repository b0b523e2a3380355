"""Consistency sampling in latents; one file that diffusers loads with trust_remote_code=True."""

from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer


class LatentCMPipeline(DiffusionPipeline):
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1) in an autoencoder's latents, from text.

    unet            gives EDM's F(c_in x, 250 ln sigma); with a `noise_schedule`, what that scheduler's network gives
                    at its own state and time of equal signal-to-noise (epsilon, v_prediction or sample)
    scheduler       noise levels and boundary condition, in latents of unit order
    statistics      a LatentStatistics, of a network trained on normalised latents
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["noise_schedule", "statistics"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: CMStochasticIterativeScheduler,
        noise_schedule: SchedulerMixin | None = None,
        statistics: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            noise_schedule=noise_schedule,
            statistics=statistics,
        )
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One picture for each prompt.

        timesteps: decreasing indices into the scheduler's noise levels, 0 being the highest, in place of even ones.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, config = self._execution_device, self.unet.config
        states = self.encode(prompts, device)
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t)
            if self.noise_schedule is None:
                output = self.unet(scaled, t, encoder_hidden_states=states, return_dict=False)[0]
            else:
                output = self.preconditioned(x, torch.exp(t.double() / 250).cpu(), states)
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        if output_type == "latent":
            images = x
        else:
            z = x if self.statistics is None else self.statistics.restored(x)
            z = z / self.vae.config.scaling_factor
            images = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Text states (B, L, D)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        states = self.text_encoder(tokens.input_ids.to(device), return_dict=False)[0]
        return states.to(self.unet.dtype)

    def preconditioned(self, x: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """F of the network's x0 at noise level sigma: x0 = c_skip x + c_out F."""
        abar = self.noise_schedule.alphas_cumprod.double().cpu().clamp(min=2.0**-24)
        table = (abar.log() - (-abar).log1p()).flip(0)  # log signal-to-noise ratio, increasing
        wanted = (-2 * sigma.log()).clamp(table[0], table[-1])
        high = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        weight = (wanted - table[high - 1]) / (table[high] - table[high - 1])
        time = float(len(table) - 1 - (high - 1 + weight))
        a, s = (float(c) for c in (wanted.sigmoid().sqrt(), (-wanted).sigmoid().sqrt()))
        z = x * (s / float(sigma) if sigma > 1 else a)
        steps = torch.full((len(x),), time, device=x.device)
        output = self.unet(z, steps, encoder_hidden_states=states, return_dict=False)[0]
        kind = self.noise_schedule.config.prediction_type
        if kind == "epsilon":
            x0 = (z - s * output) / a
        elif kind == "v_prediction":
            x0 = a * z - s * output
        else:
            x0 = output
        c_skip, c_out = (float(c) for c in self.scheduler.get_scalings(sigma))
        return (x0 - c_skip * x) / c_out
