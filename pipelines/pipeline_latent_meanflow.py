"""MeanFlow sampling in an autoencoder's latents, from text; one file for trust_remote_code=True."""

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer


class LatentMeanFlowPipeline(DiffusionPipeline):
    """z_r = z_t - (t - r) u(z_t, r, t) (arXiv 2505.13447, eq. 12); t = 0 is the data, t = 1 the noise.

    unet            takes the span as class_labels (class_embed_type "timestep"). It gives the mean velocity u at t and
                    t - r, as they are, not times 1,000; with a `noise_schedule`, what that scheduler's network gives
                    (epsilon, v_prediction or sample) at its own state and times of equal signal-to-noise, the span
                    being a fraction of its training steps
    t_max           where sampling starts
    guidance        effective scale and interval of t that were trained into u; nothing is added here
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["noise_schedule"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        noise_schedule: SchedulerMixin | None = None,
        t_max: float = 1.0,
        guidance: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            noise_schedule=noise_schedule,
        )
        self.register_to_config(t_max=t_max, guidance=guidance)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One picture for each prompt.

        sigmas: decreasing times in place of num_inference_steps even ones from t_max; the last step ends at 0.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, config = self._execution_device, self.unet.config
        states = self.encode(prompts, device)
        if sigmas is None:
            sigmas = [self.config.t_max * (1 - i / num_inference_steps) for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        times = self.scheduler.sigmas.to(device)
        shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
        x = times[0] * randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        for i, step in enumerate(self.progress_bar(self.scheduler.timesteps)):
            u = self.mean_velocity(x, times[i], times[i + 1], states)
            x = self.scheduler.step(u, step, x, return_dict=False)[0]
        if output_type == "latent":
            images = x
        else:
            z = x / self.vae.config.scaling_factor
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

    def mean_velocity(
        self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """u(x, r, t), (B, C, h, w); t and r without dimensions."""
        if self.noise_schedule is None:
            return self.network(x, t, t - r, states)
        abar = self.noise_schedule.alphas_cumprod.double().cpu().clamp(min=2.0**-24)
        table = (abar.log() - (-abar).log1p()).flip(0)  # log signal-to-noise ratio, increasing
        t, r = t.double().cpu(), r.double().cpu()
        level, step = self.in_steps(2 * ((1 - t).log() - t.log()), table)
        _, before = self.in_steps(2 * ((1 - r).log() - r.log()), table)
        a, s = level.sigmoid().sqrt(), (-level).sigmoid().sqrt()
        z = float(s / t if t > 0.5 else a / (1 - t)) * x
        output = self.network(z, step, (step - before) / (len(table) - 1), states)
        kind = self.noise_schedule.config.prediction_type
        if kind == "epsilon":
            x0 = (z - float(s) * output) / float(a)
        elif kind == "v_prediction":
            x0 = float(a) * z - float(s) * output
        else:
            x0 = output
        return (x - float(1 - t) * x0) / float(t) - x0

    def network(
        self, x: torch.Tensor, t: torch.Tensor, span: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        t, span = (a.to(x.device, torch.float32).expand(len(x)) for a in (t, span))
        return self.unet(x, t, class_labels=span, encoder_hidden_states=states, return_dict=False)[0]

    def in_steps(self, level: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The level, cut to the table's ends, and the training step at which it stands, interpolated."""
        level = level.clamp(table[0], table[-1])
        high = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        weight = (level - table[high - 1]) / (table[high] - table[high - 1])
        return level, len(table) - 1 - (high - 1 + weight)
