"""Teachers: diffusers pipeline folders, found by embedded name, then as a folder, then as a hub id."""

import json
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from torch import Tensor

from ..pipelines.pipeline_edm import EDMPipeline
from .codec import Codec
from .condition import Condition
from .config import TeacherSettings
from .denoiser import Denoiser, UNet2DConditionDenoiser, UNet2DDenoiser
from .errors import UserError
from .process import EDM, VP

TEACHERS = Path(__file__).parent / "teachers"
EMBEDDED = {"emoji-sd": TEACHERS / "emoji_sd", "fashion-edm": TEACHERS / "fashion_edm"}
KNOWN_CLASSES = "teachers so far are folders of StableDiffusionPipeline and EDMPipeline"


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


def load_pipeline(
    path: str, cls: Any = DiffusionPipeline, *, key: str = "teacher.path", **kwargs: Any
) -> Any:
    """cls.from_pretrained with one clear line instead of a traceback."""
    try:
        return cls.from_pretrained(path, **kwargs)
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


def load_edm(folder: str, **kwargs: Any) -> EDMPipeline:
    """An exported EDMPipeline part by part: diffusers would run the folder's own copy of the class, or refuse to."""
    scheduler = load_pipeline(folder, CMStochasticIterativeScheduler, subfolder="scheduler")
    return EDMPipeline(load_pipeline(folder, UNet2DModel, subfolder="unet", **kwargs), scheduler)


def lacks_scheduler(folder: Path) -> bool:
    """Whether model_index.json names none, or its configuration is not there."""
    try:
        library, _ = json.loads((folder / "model_index.json").read_text())["scheduler"]
    except (KeyError, TypeError):
        return True
    except (OSError, ValueError):
        return False
    return library is None or not (folder / "scheduler" / "scheduler_config.json").is_file()


class Teacher(ABC):
    """A frozen diffusion pipeline. Parameters need no gradient, but gradients pass through.

    denoiser    the network behind the common call
    shape       (C, H, W) of a sample that it denoises
    resolution  side of its pictures in pixels
    """

    shape: tuple[int, int, int]
    resolution: int

    def __init__(self, pipeline: DiffusionPipeline, path: str, denoiser: Denoiser):
        self.pipeline, self.path = pipeline, path
        self.denoiser, self.process = denoiser, denoiser.process
        for module in self.modules():
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, settings: TeacherSettings) -> "Teacher":
        """The teacher that a path names. Raises UserError for a path, class or scheduler that will not do."""
        folder = locate(settings.path)
        options = {k: v for k in ("variant", "revision") if (v := getattr(settings, k)) is not None}
        if class_of(folder) == EDMPipeline.__name__:
            return PixelTeacher(load_edm(folder, dtype=torch.float32, **options), settings.path)
        pipeline = load_pipeline(
            folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, **options
        )
        return LatentTeacher(pipeline, settings.path)

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the frozen parts; an autoencoder stays in float32 where its config asks for that (force_upcast)."""
        for module in self.modules():
            upcast = isinstance(module, AutoencoderKL) and module.config.get("force_upcast", False)
            module.to(device)
            for p in module.parameters():
                if not p.requires_grad:  # a LoRA trained on this network stays in float32
                    p.data = p.data.to(torch.float32 if upcast else dtype)


class LatentTeacher(Teacher, Codec):
    """A StableDiffusionPipeline with a variance-preserving scheduler, whose process is `noise`."""

    def __init__(self, pipeline: DiffusionPipeline, path: str):
        if getattr(pipeline, "scheduler", None) is None:
            raise UserError(f"teacher.path: {path} has no scheduler; save the pipeline with its scheduler")
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise UserError(f"teacher.path: {path} is a {type(pipeline).__name__}; {KNOWN_CLASSES}")
        self.noise = VP.from_scheduler(pipeline.scheduler.config)
        kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
        super().__init__(pipeline, path, UNet2DConditionDenoiser(pipeline.unet, self.noise, kind))
        config = pipeline.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.resolution = config.sample_size * pipeline.vae_scale_factor
        self.vae = pipeline.vae

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text states as the network's keyword arguments, (B, L, D)."""
        embeds, _ = self.pipeline.encode_prompt(list(captions), self.vae.device, 1, False)
        return {"encoder_hidden_states": embeds}

    def condition(self, captions: Sequence[str]) -> Condition:
        return Condition(self.encode_prompts(captions), self.encode_prompts([""]))


class PixelTeacher(Teacher):
    """Our EDMPipeline: an EDM-preconditioned UNet2DModel on pixels, class-conditional or not."""

    def __init__(self, pipeline: EDMPipeline, path: str):
        process = edm_of(pipeline.scheduler.config)
        super().__init__(pipeline, path, UNet2DDenoiser(pipeline.unet, process, "edm"))
        config = pipeline.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.resolution = config.sample_size


def edm_of(config: Mapping[str, Any]) -> EDM:
    """The process that a CMStochasticIterativeScheduler's configuration describes."""
    return EDM(config["sigma_min"], config["sigma_max"], config["sigma_data"], config["rho"])


def class_of(folder: str) -> str | None:
    """The pipeline class that a folder's model_index.json names; None for a hub id or an unreadable file."""
    try:
        name = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name[-1] if isinstance(name, list) else name
