"""Teachers: diffusers pipeline folders, found by embedded name, then as a folder, then as a hub id."""

import json
from abc import ABC
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor

from ...pipelines.export import Adapter, in_float32
from ...pipelines.pipeline_edm import EDMPipeline
from ..diffusion.condition import Condition
from ..diffusion.denoiser import Denoiser
from ..diffusion.process import EDM, VP
from ..errors import UserError
from ..settings import TeacherSettings
from ..teachers import EMBEDDED
from .codec import Codec, Units, vae_scale_factor
from .families.known import FAMILY_NAMES, family_of
from .frozen import content_hash, move_frozen
from .hub import refusal
from .lora_files import fuse_lora
from .network_adapters import UNet2DDenoiser
from .quantise import quantise_base
from .teacher_parts import check_parts, settle_side
from .weight_files import refuse_variant

KNOWN_CLASSES = f"teachers so far are {', '.join(FAMILY_NAMES)} and {EDMPipeline.__name__}"


def locate(path: str) -> str:
    """The folder of an embedded teacher or of the user (a run's: its pipeline/), else `path` itself as a hub id."""
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "pipeline" / "model_index.json").is_file():
            return str(folder / "pipeline")
        if not (folder / "model_index.json").is_file():
            raise UserError(f"teacher.path: {path} has no model_index.json; give a diffusers pipeline folder")
        return str(folder)
    if folder.is_file() or folder.suffix in (".safetensors", ".ckpt"):
        raise UserError(
            f"teacher.path: {path}: single files are not supported; convert it with diffusers' from_single_file and "
            "save_pretrained, and give that folder"
        )
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
        if refused := refusal(path, error):
            raise UserError(f"{key}: {refused}") from error
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
        return lacks(folder, "scheduler") or not (folder / "scheduler" / "scheduler_config.json").is_file()
    except (OSError, ValueError):
        return False


def lacks(folder: Path, part: str) -> bool:
    """Whether model_index.json names no class for a component."""
    try:
        library, _ = json.loads((folder / "model_index.json").read_text())[part]
    except (KeyError, TypeError):
        return True
    return library is None


class Teacher(ABC):
    """A frozen diffusion pipeline. Parameters need no gradient, but gradients pass through.

    denoiser    the network behind the common call
    device      where the network runs
    shape       (C, H, W) of a sample that it denoises
    resolution  side of its pictures in pixels
    """

    shape: tuple[int, int, int]
    resolution: int

    def __init__(self, pipeline: DiffusionPipeline, path: str, denoiser: Denoiser):
        self.pipeline, self.path = pipeline, path
        self.denoiser, self.process = denoiser, denoiser.process
        self.device = torch.device("cpu")
        for module in self.modules():
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, settings: TeacherSettings, resolution: int | None = None) -> "Teacher":
        """The teacher that a path names; a latent one works at `resolution`, by default its own.

        Raises UserError for a path, class, scheduler or resolution that will not do.
        """
        folder = locate(settings.path)
        refuse_variant(Path(folder), settings.variant)
        options = {k: v for k in ("variant", "revision") if (v := getattr(settings, k)) is not None}
        if class_of(folder) == EDMPipeline.__name__:
            for key in ("lora", "quantisation"):
                if getattr(settings, key) is not None:
                    raise UserError(f"teacher.{key}: {settings.path} works on pixels; leave it out")
            return PixelTeacher(load_edm(folder, dtype=torch.float32, **options), settings.path)
        if class_of(folder) in (None, "StableDiffusionPipeline"):
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if class_of(folder) == "StableDiffusion3Pipeline" and lacks(Path(folder), "text_encoder_3"):
            options |= {"text_encoder_3": None, "tokenizer_3": None}  # diffusers asks for them by name
        pipeline = load_pipeline(folder, dtype=torch.float32, **options)
        if settings.lora is not None:
            fuse_lora(pipeline, settings.lora, settings.lora_scale, key="teacher.lora")
        return LatentTeacher(pipeline, settings.path, resolution)

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, torch.nn.Module)]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the frozen parts, each in the precision that it needs (`move_frozen`)."""
        self.device = device
        for module in self.modules():
            move_frozen(module, device, dtype)


class LatentTeacher(Teacher, Codec):
    """A latent pipeline of diffusers; `family` knows what is its class's own."""

    def __init__(self, pipeline: Any, path: str, resolution: int | None = None):
        if getattr(pipeline, "scheduler", None) is None:
            raise UserError(f"teacher.path: {path} has no scheduler; save the pipeline with its scheduler")
        family = family_of(pipeline)
        if family is None:
            raise UserError(f"teacher.path: {path} is a {type(pipeline).__name__}; {KNOWN_CLASSES}")
        self.family, self.vae = family, pipeline.vae
        settle_side(family.network, self.vae, resolution, path)
        super().__init__(pipeline, path, family.denoiser())
        check_parts(family, path, self.latent_shape(0)[0])
        self.resolution = resolution or family.resolution()
        self.shape = self.latent_shape(self.resolution)
        unit = vae_scale_factor(self.vae) * family.patch
        if self.resolution % unit:
            raise UserError(f"resolution: {self.resolution} is no multiple of {unit}, which {path} needs")

    def units(self) -> Units:
        return self.family.units()

    def quantise(self, dtype: torch.dtype) -> None:
        """Integers of 8 bits in the network's linear layers, the others in `dtype`."""
        self.family.network.to(dtype)
        quantise_base(self.family.network)

    @property
    def noise(self) -> VP:
        """The process of a variance-preserving teacher. Raises UserError for another."""
        if not isinstance(self.process, VP):
            raise UserError(
                f"teacher.path: {self.path} works in straight paths (rectified flow); this method needs a "
                "variance-preserving teacher such as Stable Diffusion"
            )
        return self.process

    @property
    def text_encoders(self) -> list[Any]:
        found = (getattr(self.pipeline, name) for name in self.family.encoders)
        return [encoder for encoder in found if encoder is not None]

    def texts_hash(self) -> str:
        """Of all that `encode_prompts` computes with."""
        tokenizers = (
            getattr(self.pipeline, name.replace("text_encoder", "tokenizer")) for name in self.family.encoders
        )
        shapes = sorted(self.family.shapes().items())
        return f"{type(self.pipeline).__name__} {content_hash(*self.text_encoders, *tokenizers)} {shapes}"

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders say, as the network's keyword arguments, first dimension that of the captions."""
        return self.family.encode(list(captions), self.device)

    @torch.no_grad()
    def encode_empty(self) -> dict[str, Tensor]:
        """The same where the prompt is dropped, first dimension 1."""
        return self.family.empty(self.device)

    def told(self, texts: dict[str, Tensor], empty: dict[str, Tensor]) -> Condition:
        """The condition of encoded prompts, with the arguments that no prompt changes."""
        first = next(iter(texts.values()))
        fixed = self.family.fixed(len(first), self.resolution)
        return Condition({**texts, **{k: v.to(first.device) for k, v in fixed.items()}}, empty)

    def condition(self, captions: Sequence[str]) -> Condition:
        return self.told(self.encode_prompts(captions), self.encode_empty())

    def assembled(self, network: Any, cls: Any = None, **parts: Any) -> Any:
        """A pipeline of the teacher's class, or of `cls`, with `network` for its own and other `parts`, in float32."""
        cls, name = cls or type(self.pipeline), self.family.component
        components = in_float32(
            {k: v for k, v in self.pipeline.components.items() if k not in (name, *parts)}
        )
        config = {k: v for k, v in self.pipeline.config.items() if k in signature(cls).parameters}
        return cls(**{**config, **components, **parts, name: network})

    def sampler(self) -> Any:
        """The teacher's own pipeline without its text encoders, for prompts that are encoded."""
        kind = type(self.pipeline)
        parts = {k: v for k, v in self.pipeline.components.items() if k not in self.family.encoders}
        parts["scheduler"] = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        config = {k: v for k, v in self.pipeline.config.items() if k in signature(kind).parameters}
        pipeline = kind(**{**config, **dict.fromkeys(self.family.encoders), **parts})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def adapter(self, weights: dict[str, Tensor], scheduler: Any) -> Adapter:
        """A LoRA of the teacher's network with what its export needs."""
        return Adapter(weights, scheduler, type(self.pipeline), self.family.component)

    def call(self) -> dict[str, Any]:
        """Arguments of a pipeline's call that give pictures of the teacher's resolution; {} where it is the default."""
        return self.family.call(self.resolution)


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
