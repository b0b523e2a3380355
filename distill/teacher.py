"""Teachers: diffusers pipeline folders, found by embedded name, then as a folder, then as a hub id."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from .condition import Condition
from .config import TeacherSettings
from .denoiser import UNet2DConditionDenoiser
from .draws import Draws
from .errors import UserError
from .process import VP

EMBEDDED = {"emoji-sd": Path(__file__).parent / "teachers" / "emoji_sd"}


def locate(path: str) -> str:
    """The folder of an embedded teacher or of the user, else `path` itself as a hub id."""
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"teacher.path: {path} has no model_index.json; give a diffusers pipeline folder")
        return str(folder)
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        known = ", ".join(EMBEDDED)
        raise UserError(
            f"teacher.path: no folder {path}; give a pipeline folder, a hub id or one of: {known}"
        )
    return path


def load_pipeline(path: str, *, key: str = "teacher.path", **kwargs: Any) -> DiffusionPipeline:
    """DiffusionPipeline.from_pretrained with one clear line instead of a traceback."""
    try:
        return DiffusionPipeline.from_pretrained(path, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        if Path(path).is_dir() and lacks_scheduler(Path(path)):
            raise UserError(
                f"{key}: {path} has no scheduler; save the pipeline with its scheduler"
            ) from error
        if Path(path).is_dir():
            raise UserError(
                f"{key}: {path} is not a readable pipeline folder ({reason}); save it again"
            ) from error
        raise UserError(
            f"{key}: {path} could not be fetched from the hub ({reason}); check the name and the network, "
            "or give a local pipeline folder"
        ) from error


def lacks_scheduler(folder: Path) -> bool:
    """Whether model_index.json names none, or its configuration is not there."""
    try:
        library, _ = json.loads((folder / "model_index.json").read_text())["scheduler"]
    except (KeyError, TypeError):
        return True
    except (OSError, ValueError):
        return False
    return library is None or not (folder / "scheduler" / "scheduler_config.json").is_file()


class Teacher:
    """A frozen latent diffusion pipeline. Parameters need no gradient, but gradients pass through.

    denoiser  the network behind the common call
    Latents are in the diffusion model's units: scaling_factor * (autoencoder latent - shift_factor).
    """

    def __init__(self, pipeline: DiffusionPipeline, path: str):
        if getattr(pipeline, "scheduler", None) is None:
            raise UserError(f"teacher.path: {path} has no scheduler; save the pipeline with its scheduler")
        if not isinstance(pipeline, StableDiffusionPipeline):
            name = type(pipeline).__name__
            raise UserError(
                f"teacher.path: {path} is a {name}; teachers so far are StableDiffusionPipeline folders"
            )
        self.pipeline, self.path = pipeline, path
        self.process = VP.from_scheduler(pipeline.scheduler.config)
        kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
        self.denoiser = UNet2DConditionDenoiser(pipeline.unet, self.process, kind)
        for module in self.modules():
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, settings: TeacherSettings) -> "Teacher":
        folder = locate(settings.path)
        options = {"variant": settings.variant, "revision": settings.revision}
        pipeline = load_pipeline(
            folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False,
            **{k: v for k, v in options.items() if v is not None},
        )  # fmt: skip
        return cls(pipeline, settings.path)

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the frozen parts; the autoencoder stays in float32 where its config asks for that (force_upcast)."""
        upcast_vae = self.vae.config.get("force_upcast", False)
        for module in self.modules():
            upcast = module is self.vae and upcast_vae
            module.to(device)
            for p in module.parameters():
                if not p.requires_grad:  # a LoRA trained on this network stays in float32
                    p.data = p.data.to(torch.float32 if upcast else dtype)

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipeline.unet.config.sample_size
        return (self.pipeline.unet.config.in_channels, size, size)

    @property
    def resolution(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text states as the network's keyword arguments, (B, L, D)."""
        embeds, _ = self.pipeline.encode_prompt(list(captions), self.vae.device, 1, False)
        return {"encoder_hidden_states": embeds}

    def condition(self, captions: Sequence[str]) -> Condition:
        return Condition(self.encode_prompts(captions), self.encode_prompts([""]))

    def posterior(self, images: Tensor) -> Tensor:
        """(B, 2C, h, w): mean and log-variance of images (B, 3, H, W) in [-1, 1], unscaled."""
        dist = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return torch.cat([dist.mean, dist.logvar], dim=1).float()

    def latents(self, posterior: Tensor, draws: Draws) -> Tensor:
        """A sample of the posterior in the diffusion model's units, (B, C, h, w)."""
        mean, logvar = posterior.float().chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * draws.normal(mean.shape[1:])
        return (z - self._shift()) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], differentiable."""
        z = latents / self.vae.config.scaling_factor + self._shift()
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]

    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0
