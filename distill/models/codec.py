"""An autoencoder between pictures and latents: a latent teacher's, or one of its own for methods without a teacher."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from ..diffusion.draws import Draws
from ..errors import UserError
from ..settings import AutoencoderSettings
from .frozen import move_frozen

# As published in its config.json; scaling_factor is AutoencoderKL's default, 0.18215.
SD_VAE: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
KNOWN_AUTOENCODERS = {"stabilityai/sd-vae-ft-mse": SD_VAE, "stabilityai/sd-vae-ft-ema": SD_VAE}

Unit = float | tuple[float, ...]  # for all channels, or for each
Units = tuple[Unit, Unit]


class Codec:
    """Latents are in the diffusion model's units: scale * (autoencoder latent - shift), see `units`.

    To AutoencoderKLWan pictures are videos of one frame.
    """

    vae: Any
    path: str

    def posterior(self, images: Tensor) -> Tensor:
        """(B, 2C, h, w): mean and log-variance of images (B, 3, H, W) in [-1, 1], unscaled."""
        dist = self.vae.encode(self._framed(images.to(self.vae.dtype))).latent_dist
        return self._unframed(torch.cat([dist.mean, dist.logvar], dim=1).float())

    def latents(self, posterior: Tensor, draws: Draws) -> Tensor:
        """A sample of the posterior in the diffusion model's units, (B, C, h, w)."""
        mean, logvar = posterior.float().chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * draws.normal(mean.shape[1:])
        return self.scaled(z)

    def mean_latents(self, posterior: Tensor) -> Tensor:
        """The posterior's mean in the diffusion model's units, (B, C, h, w)."""
        return self.scaled(posterior.float().chunk(2, dim=1)[0])

    def units(self) -> Units:
        """Shift and scale: shift_factor and scaling_factor, as the pipelines of this project decode."""
        config = self.vae.config
        return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents of the autoencoder (B, C, h, w) in the diffusion model's units."""
        shift, scale = (channels(u, latents) for u in self.units())
        return (latents - shift) * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The same latents in the autoencoder's units."""
        shift, scale = (channels(u, latents) for u in self.units())
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], differentiable."""
        z = self._framed(self.unscaled(latents).to(self.vae.dtype))
        return self._unframed(self.vae.decode(z, return_dict=False)[0])

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) for pictures of this side."""
        side = resolution // vae_scale_factor(self.vae)
        return self.vae.config.z_dim if self._video else self.vae.config.latent_channels, side, side

    @property
    def _video(self) -> bool:
        return isinstance(self.vae, AutoencoderKLWan)

    def _framed(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if self._video else x

    def _unframed(self, x: Tensor) -> Tensor:
        return x.squeeze(2) if self._video else x


def channels(unit: Unit, like: Tensor) -> float | Tensor:
    """One number, or one for each channel of `like` (B, C, h, w)."""
    return unit if isinstance(unit, float) else like.new_tensor(unit).view(-1, 1, 1)


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent along a side."""
    if isinstance(vae, AutoencoderKLWan):
        return vae.config.scale_factor_spatial
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Autoencoder(Codec):
    """A frozen AutoencoderKL. Gradients pass through."""

    def __init__(self, vae: AutoencoderKL, path: str):
        self.vae, self.path = vae.requires_grad_(False).eval(), path

    @classmethod
    def load(cls, settings: AutoencoderSettings) -> "Autoencoder":
        """From a folder of AutoencoderKL or a hub id. Raises UserError for one that cannot be read."""
        try:
            vae = AutoencoderKL.from_pretrained(
                settings.path,
                subfolder=settings.subfolder,
                revision=settings.revision,
                dtype=torch.float32,
            )
        except Exception as error:
            raise unreadable(settings, error) from error
        return cls(vae, settings.path)

    @classmethod
    def planned(cls, settings: AutoencoderSettings) -> "Autoencoder":
        """The same on the meta device, from its configuration alone; nothing is fetched for the known ones."""
        try:
            config = KNOWN_AUTOENCODERS.get(settings.path) or AutoencoderKL.load_config(
                settings.path, subfolder=settings.subfolder, revision=settings.revision
            )
            with torch.device("meta"):
                return cls(AutoencoderKL.from_config(config), settings.path)
        except Exception as error:
            raise unreadable(settings, error) from error

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """As `move_frozen`."""
        move_frozen(self.vae, device, dtype)


def unreadable(settings: AutoencoderSettings, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    known = ", ".join(KNOWN_AUTOENCODERS)
    return UserError(
        f"vae.path: no AutoencoderKL can be read from {settings.path} ({reason}); give its folder (with vae.subfolder "
        f"inside a pipeline) or a hub id such as {known.split(',')[0]}"
    )


def is_here(settings: AutoencoderSettings) -> bool:
    """Whether the weights are on this machine."""
    if Path(settings.path).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    parts = [f"{settings.subfolder}/{n}" if settings.subfolder else n for n in names]
    return any(isinstance(try_to_load_from_cache(settings.path, p), str) for p in parts)
