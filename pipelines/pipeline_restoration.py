"""Pictures restored from an intermediate state of a few-step text student; one file for trust_remote_code=True."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

ColourFix = Literal["none", "wavelet", "adain"]


class RestorationPipeline(DiffusionPipeline):
    """The degraded picture's latent is the x0 of step start_index - 1, the remaining steps restore it (arXiv
    2502.02215): x_t = sqrt(abar_t) z + sqrt(1 - abar_t) n at t = timesteps[start_index].

    unet            that LCMScheduler samples in few steps, with an embedding of the guidance scale or without
    image_encoder   a CLIPVisionModel or TimmWrapperModel, whose tokens `visual_encoder` turns into those of a text; it
                    sees pictures as `image_input` (size in pixels, mean and std of [0, 1]) says
    controlnet      sees the degraded picture in [-1, 1]
    text_encoder    in place of the two, for a student without them
    timesteps, start_index, guidance_scale   of a call that names none
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->visual_encoder->controlnet->unet->vae"
    _optional_components: ClassVar[list[str]] = [
        "controlnet", "visual_encoder", "image_encoder", "text_encoder", "tokenizer",
    ]  # fmt: skip

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: LCMScheduler,
        controlnet: ControlNetModel | None = None,
        visual_encoder: ModelMixin | None = None,
        image_encoder: PreTrainedModel | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        image_input: dict[str, Any] | None = None,
        timesteps: Sequence[int] = (999, 759, 499, 259),
        start_index: int = 1,
        guidance_scale: float = 8.0,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, vae=vae, scheduler=scheduler, controlnet=controlnet, visual_encoder=visual_encoder,
            image_encoder=image_encoder, text_encoder=text_encoder, tokenizer=tokenizer,
        )  # fmt: skip
        self.register_to_config(
            image_input=image_input,
            timesteps=list(timesteps),
            start_index=start_index,
            guidance_scale=guidance_scale,
        )
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = unet.config.sample_size * factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        timesteps: list[int] | None = None,
        start_index: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        colour_fix: ColourFix = "none",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """A restored picture for each degraded `image`, of the side that unet and vae have; tensors are in [0, 1].

        prompt       for a student without visual tokens; none is the empty one
        start_index  of 1 .. len(timesteps) - 1: the later, the closer to `image`
        colour_fix   gives the output the colours of `image`: its low frequencies, or its channels' mean and deviation
        """
        device = self._execution_device
        times = list(timesteps or self.config.timesteps)
        start = self.config.start_index if start_index is None else start_index
        if not 1 <= start < len(times):
            raise ValueError(
                f"start_index {start} is not in 1..{len(times) - 1}: step 0 is the degraded picture"
            )
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        seen = self.image_processor.preprocess(image, self.resolution, self.resolution).to(
            device, torch.float32
        )
        states = self.encode(seen, prompt, device)
        z = self.latents(seen)
        self.scheduler.set_timesteps(timesteps=times, device=device)
        self.scheduler.set_begin_index(start)
        remaining = self.scheduler.timesteps[start:]
        noise = randn_tensor(z.shape, generator=generator, device=device, dtype=z.dtype)
        x = x0 = self.scheduler.add_noise(z, noise, remaining[:1].expand(len(z)))
        for t in self.progress_bar(remaining):
            eps = self.predict(x, t, states, seen, scale)
            x, x0 = self.scheduler.step(eps, t, x, generator=generator, return_dict=False)
        if output_type == "latent":
            images = x0
        else:
            z = x0 / self.vae.config.scaling_factor
            images = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            images = colour_fixed(images.float(), seen, colour_fix)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def latents(self, seen: torch.Tensor) -> torch.Tensor:
        """The mean of the autoencoder's posterior, in the diffusion model's units."""
        mean = self.vae.encode(seen.to(self.vae.dtype)).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    def encode(
        self, seen: torch.Tensor, prompt: str | list[str] | None, device: torch.device
    ) -> torch.Tensor:
        """What the networks are told, (B, L, D): visual tokens, or those of the prompts."""
        if self.visual_encoder is not None:
            if prompt is not None:
                raise ValueError("prompt: this restorer is told the picture's tokens; leave it out")
            tokens = image_tokens(self.image_encoder, seen, **self.config.image_input)
            return self.visual_encoder(tokens.to(self.visual_encoder.dtype)).to(self.unet.dtype)
        prompts = [prompt or ""] * len(seen) if prompt is None or isinstance(prompt, str) else prompt
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(device), return_dict=False)[0].to(self.unet.dtype)

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor, seen: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The U-Net's output, with the ControlNet's residuals where there is one."""
        told: dict[str, Any] = {"encoder_hidden_states": states, "return_dict": False}
        residuals: dict[str, Any] = {}
        if self.controlnet is not None:
            picture = seen.to(self.controlnet.dtype)
            down, mid = self.controlnet(x.to(picture.dtype), t, controlnet_cond=picture, **told)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        width = self.unet.config.time_cond_proj_dim
        if width is not None:  # latent consistency models are told w = g - 1
            told["timestep_cond"] = (
                embedding(scale - 1, width).to(x.device, self.unet.dtype).expand(len(x), -1)
            )
        return self.unet(x.to(self.unet.dtype), t, **told, **residuals)[0].to(x.dtype)


def embedding(w: float, width: int) -> torch.Tensor:
    """(1, width): sines and cosines of 1000 w, rounded as LatentConsistencyModelPipeline rounds them."""
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    angle = 1000 * torch.tensor(w) * torch.exp(torch.arange(half) * -step)
    return F.pad(torch.cat([angle.sin(), angle.cos()]), (0, width % 2))[None]


def image_tokens(
    encoder: Any, images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """(B, N, D) of pictures (B, 3, H, W) in [-1, 1]: all of CLIP's tokens after its last norm, or the places of a
    convolutional network's last features."""
    pixels = encoder_input(images / 2 + 0.5, size, mean, std)
    states = encoder(pixels.to(encoder.dtype)).last_hidden_state
    if states.ndim == 4:
        return states.flatten(2).mT
    return getattr(encoder, "vision_model", encoder).post_layernorm(states)


def encoder_input(
    images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as an image network was trained to see them, (B, 3, size, size)."""
    x = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    centre, spread = (x.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (x - centre) / spread


def colour_fixed(output: torch.Tensor, seen: torch.Tensor, kind: ColourFix) -> torch.Tensor:
    """The output (B, 3, H, W) with the colours of `seen`.

    wavelet  its high frequencies with the low ones of `seen`; adain  its channels moved to the mean and the standard
    deviation of those of `seen`
    """
    if kind == "none":
        return output
    if kind == "wavelet":
        return output - low_frequencies(output) + low_frequencies(seen)
    if kind != "adain":
        raise ValueError(f"colour_fix {kind!r} is not none, wavelet or adain")
    (mean, std), (wanted_mean, wanted_std) = moments(output), moments(seen)
    return (output - mean) / std * wanted_std + wanted_mean


def low_frequencies(x: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """What the dilated binomial blurs of 3 x 3 leave, at distances of 1, 2, 4, ... pixels."""
    row = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
    for level in range(levels):
        d = 2**level
        x = F.conv2d(F.pad(x, (d, d, d, d), "replicate"), kernel, groups=x.shape[1], dilation=d)
    return x


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, (B, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
