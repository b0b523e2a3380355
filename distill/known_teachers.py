"""What a teacher consists of, without its weights: component configurations from a folder, the hub, or known facts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..pipelines.pipeline_edm import EDMPipeline
from .config import TeacherSettings
from .errors import UserError
from .teacher import EMBEDDED, KNOWN_CLASSES, LatentTeacher, PixelTeacher, Teacher, class_of, locate

PARTS = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json",
         "scheduler": "scheduler_config.json"}  # fmt: skip
PIXEL_PARTS = ("unet", "scheduler")
WEIGHTS = (".safetensors", ".bin")

# As published in the repositories' configuration files; parameters: 859,520,964 + 83,653,863 + 123,060,480.
SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class": ("diffusers", "UNet2DConditionModel"),
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class": ("diffusers", "AutoencoderKL"),
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "_class": ("transformers", "CLIPTextModel"),
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "scheduler": {
        "_class": ("diffusers", "PNDMScheduler"),
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
}

KNOWN_TEACHERS = {"stable-diffusion-v1-5/stable-diffusion-v1-5": SD15}


@dataclass(frozen=True)
class Blueprint:
    """parts: the configuration of each component, its library and class under "_class"; missing: components whose
    weights are not on this machine; origin: where the configurations were read."""

    parts: dict[str, dict[str, Any]]
    missing: tuple[str, ...]
    origin: str


def blueprint(settings: TeacherSettings) -> Blueprint:
    """Found as Teacher.load finds it: embedded name, folder, hub id (its local cache, known facts, the network)."""
    place = locate(settings.path)
    if settings.path in EMBEDDED and not (Path(place) / "model_index.json").is_file():
        raise UserError(
            f"teacher.path: the embedded {settings.path} is not in this installation; train it with "
            "`python scripts/train_teacher.py configs/emoji/teacher.yaml` or give another pipeline folder"
        )
    if Path(place).is_dir():
        parts = _read_folder(Path(place), settings.path)
        return Blueprint(parts, _without_weights(Path(place), parts, settings.variant), "its folder")
    cached = _snapshot(settings)
    if cached is not None and all((cached / p / f).is_file() for p, f in PARTS.items()):
        parts = _read_folder(cached, settings.path)
        return Blueprint(parts, _without_weights(cached, parts, settings.variant), "the local hub cache")
    if settings.path in KNOWN_TEACHERS:
        parts = KNOWN_TEACHERS[settings.path]
        return Blueprint(
            parts, _without_weights(cached, parts, settings.variant), "its published configuration"
        )
    parts = _read_folder(_fetch_configurations(settings), settings.path)
    return Blueprint(parts, _without_weights(cached, parts, settings.variant), "the hub")


def meta_teacher(settings: TeacherSettings, parts: dict[str, dict[str, Any]]) -> Teacher:
    """The teacher with every weight on the meta device, in float32 and without a tokenizer."""
    built = {}
    for name, config in parts.items():
        library, kind = config["_class"]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind, None)
        if cls is None:
            raise UserError(
                f"teacher.path: {settings.path}: {library} here has no {kind}; install a newer one"
            )
        own = {k: v for k, v in config.items() if k != "_class"}
        if name == "scheduler":
            built[name] = cls.from_config(own)
            continue
        with torch.device("meta"):
            built[name] = (
                cls.from_config(own) if library == "diffusers" else cls(cls.config_class.from_dict(own))
            )
    if "vae" not in built:
        return PixelTeacher(EDMPipeline(**built), settings.path)
    pipeline = diffusers.StableDiffusionPipeline(
        **built, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return LatentTeacher(pipeline, settings.path)


def _read_folder(folder: Path, path: str) -> dict[str, dict[str, Any]]:
    index, kind = _read_json(folder / "model_index.json", path), class_of(str(folder))
    if kind not in ("StableDiffusionPipeline", "EDMPipeline"):
        raise UserError(f"teacher.path: {path} is a {kind}; {KNOWN_CLASSES}")
    parts = {}
    for name in PARTS if kind == "StableDiffusionPipeline" else PIXEL_PARTS:
        file = PARTS[name]
        if None in (index.get(name) or [None]):
            raise UserError(f"teacher.path: {path} has no {name}; save the pipeline with its {name}")
        parts[name] = {**_read_json(folder / name / file, path), "_class": tuple(index[name])}
    return parts


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        name = f"{file.parent.name}/{file.name}" if file.name != "model_index.json" else file.name
        raise UserError(f"teacher.path: {path}: {name} cannot be read ({error}); save it again") from error


def _without_weights(folder: Path | None, parts: dict[str, Any], variant: str | None) -> tuple[str, ...]:
    """Components with no weight file of the variant below `folder`."""
    lacking = []
    for name in parts:
        files = [f.name for f in (folder / name).glob("*") if f.suffix in WEIGHTS] if folder else []
        if name != "scheduler" and not any(variant is None or f".{variant}." in f for f in files):
            lacking.append(name)
    return tuple(lacking)


def _snapshot(settings: TeacherSettings) -> Path | None:
    """The hub id's folder in the local cache, None without one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _fetch_configurations(settings: TeacherSettings) -> Path:
    """Fetches the configuration files alone, some kilobytes."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["model_index.json", *(f"{part}/{file}" for part, file in PARTS.items())]
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=wanted))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        known = ", ".join(KNOWN_TEACHERS)
        raise UserError(
            f"teacher.path: {settings.path} is not in the local cache and cannot be reached on the hub ({reason}); "
            f"check the name and the network, or give a local folder (known without a network: {known})"
        ) from error
