"""What a teacher consists of, without its weights: component configurations from a folder, the hub, or known facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ...pipelines.pipeline_edm import EDMPipeline
from ..errors import UserError
from ..models.families.known import FAMILIES
from ..models.hub import refusal
from ..models.teacher import KNOWN_CLASSES, LatentTeacher, PixelTeacher, Teacher, class_of, locate
from ..models.weight_files import component_sizes, refuse_variant, variants_in
from ..readers import Unreadable, read_json
from ..settings import TeacherSettings
from ..teachers import EMBEDDED
from .published_teachers import KNOWN_TEACHERS, Architecture


@dataclass(frozen=True)
class Blueprint:
    """missing: components whose weights are not on this machine; origin: where the configurations were read; sizes:
    bytes of the components' weight files, where the hub was asked."""

    architecture: Architecture
    missing: tuple[str, ...]
    origin: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def blueprint(settings: TeacherSettings) -> Blueprint:
    """Found as Teacher.load finds it: embedded name, folder, hub id (its local cache, known facts, the network)."""
    place = locate(settings.path)
    if settings.path in EMBEDDED and not (Path(place) / "model_index.json").is_file():
        raise UserError(
            f"teacher.path: the embedded {settings.path} is not in this installation; train it with "
            "`fewstep train-teacher configs/emoji/teacher.yaml` or give another pipeline folder"
        )
    if Path(place).is_dir():
        refuse_variant(Path(place), settings.variant)
        return _drawn(_read_folder(Path(place), settings.path), Path(place), settings, "its folder")
    cached = _snapshot(settings)
    if cached is not None and _is_whole(cached):
        return _drawn(_read_folder(cached, settings.path), cached, settings, "the local hub cache")
    if settings.path in KNOWN_TEACHERS:
        return _drawn(KNOWN_TEACHERS[settings.path], cached, settings, "its published configuration")
    found = _read_folder(_fetch_configurations(settings), settings.path)
    return replace(_drawn(found, cached, settings, "the hub"), sizes=_sizes(settings))


def meta_teacher(
    settings: TeacherSettings, architecture: Architecture, resolution: int | None = None
) -> Teacher:
    """The teacher with every weight on the meta device, in float32 and without a tokenizer."""
    built = {}
    for name, config in architecture.parts.items():
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
    if architecture.kind == EDMPipeline.__name__:
        return PixelTeacher(EDMPipeline(**built), settings.path)
    pipeline = getattr(diffusers, architecture.kind)
    takes = signature(pipeline).parameters
    absent = {k: None for k, p in takes.items() if p.default is p.empty and k not in built}
    options = {k: v for k, v in architecture.options.items() if k in takes}
    if "safety_checker" in absent:
        options["requires_safety_checker"] = False
    return LatentTeacher(pipeline(**built, **absent, **options), settings.path, resolution)


def _drawn(
    architecture: Architecture, folder: Path | None, settings: TeacherSettings, origin: str
) -> Blueprint:
    return Blueprint(architecture, _without_weights(folder, architecture.parts, settings.variant), origin)


def _parts_of(kind: str | None) -> tuple[str, ...]:
    """The components that a pipeline class computes with, () for a class without an adapter."""
    if kind == EDMPipeline.__name__:
        return ("unet", "scheduler")
    family = next((f for cls, f in FAMILIES.items() if cls.__name__ == kind), None)
    return () if family is None else (family.component, "vae", *family.encoders, "scheduler")


def _file_of(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _is_whole(folder: Path) -> bool:
    """Whether all configurations of a cached pipeline are there."""
    if not (folder / "model_index.json").is_file():
        return False
    index = _read_json(folder / "model_index.json", str(folder))
    parts = [p for p in _parts_of(class_of(str(folder))) if _named(index, p)]
    return bool(parts) and all((folder / p / _file_of(p)).is_file() for p in parts)


def _read_folder(folder: Path, path: str) -> Architecture:
    index, kind = _read_json(folder / "model_index.json", path), class_of(str(folder))
    names = _parts_of(kind)
    if not kind or not names:
        raise UserError(f"teacher.path: {path} is a {kind}; {KNOWN_CLASSES}")
    parts = {}
    for name in names:
        if not _named(index, name):
            if name == "text_encoder_3":  # Stable Diffusion 3 runs without its T5
                continue
            raise UserError(f"teacher.path: {path} has no {name}; save the pipeline with its {name}")
        parts[name] = {**_read_json(folder / name / _file_of(name), path), "_class": tuple(index[name])}
    options = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    return Architecture(kind, parts, options)


def _named(index: dict[str, Any], part: str) -> bool:
    """Whether model_index.json names a class for a component."""
    value = index.get(part)
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        return read_json(file, dict[str, Any], remedy="save the pipeline again")
    except (FileNotFoundError, Unreadable) as error:
        name = f"{file.parent.name}/{file.name}" if file.name != "model_index.json" else file.name
        raise UserError(f"teacher.path: {path}: {name} cannot be read ({error}); save it again") from error


def _without_weights(folder: Path | None, parts: dict[str, Any], variant: str | None) -> tuple[str, ...]:
    """Components with no weight file of the variant below `folder`."""
    lacking = []
    for name in parts:
        if name != "scheduler" and not (folder and variants_in(folder / name) & {None, variant}):
            lacking.append(name)
    return tuple(lacking)


def _snapshot(settings: TeacherSettings) -> Path | None:
    """The hub id's folder in the local cache, None without one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _sizes(settings: TeacherSettings) -> dict[str, int]:
    """Bytes that each component's weights have on the hub, in the variant's files where it has some."""
    from huggingface_hub import HfApi

    try:
        found = (
            HfApi().model_info(settings.path, revision=settings.revision, files_metadata=True).siblings or []
        )
    except (OSError, ValueError):
        return {}
    return component_sizes({file.rfilename: file.size or 0 for file in found}, settings.variant)


def _fetch_configurations(settings: TeacherSettings) -> Path:
    """Fetches the configuration files alone, some kilobytes."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=wanted))
    except Exception as error:
        if refused := refusal(settings.path, error):
            raise UserError(f"teacher.path: {refused}") from error
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        known = ", ".join(KNOWN_TEACHERS)
        raise UserError(
            f"teacher.path: {settings.path} is not in the local cache and cannot be reached on the hub ({reason}); "
            f"check the name and the network, or give a local folder (known without a network: {known})"
        ) from error
