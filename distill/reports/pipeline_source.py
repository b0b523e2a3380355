"""Pictures from a diffusers pipeline."""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...pipelines.ip_adapter import FILE, FOLDER
from ..errors import UserError, first_line
from ..models.lora_files import fuse_lora
from .conditions import control_in
from .inputs import Inputs
from .loading import load_pipeline
from .source import Source, hash_files, short, side

SEED_STRIDE = 1_000_000
QUANTISATION = "uint8, pipeline output in [0, 1] times 255, rounded and clipped"
KEYWORDS = {"caption": "prompt", "class": "class_labels"}


class NotFinite(UserError):
    """Pictures that hold NaN or infinity."""


class PipelineSource(Source):
    """A pipeline folder or hub id; each picture has its own seed, whatever the batch size."""

    seed_rule = f"one CPU torch.Generator per image, seed_block * {SEED_STRIDE} + i"
    quantisation = QUANTISATION

    def __init__(
        self, pipeline: str, device: torch.device, *, lora: str | None = None, trust_remote_code: bool = False
    ):
        """lora: a file, or owner/name/file of the hub. Raises UserError if it cannot be loaded or needs inputs other
        than a prompt or a class label."""
        self.name, self.lora = pipeline, lora
        self.device = device
        self.quantise: Callable[[Tensor], Tensor] = quantise
        self.pipe, self.sampling = load_pipeline(pipeline, trust_remote_code)
        if lora is not None:
            fuse_lora(self.pipe, lora, key=f"{pipeline}+{lora}")
        self.prompted = (Path(pipeline) / FOLDER / FILE).is_file()
        if self.prompted:
            self._load_ip_adapter()
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if getattr(self.pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None  # it would have black squares scored in place of pictures
        self.evaluated = 0
        denoiser = getattr(self.pipe, "unet", None) or getattr(self.pipe, "transformer", None)
        if denoiser is not None:
            denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        self.parameters = inspect.signature(type(self.pipe).__call__).parameters
        needed = [
            p.name
            for p in self.parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        ]
        self.num_classes = _num_classes(denoiser)
        self.controlled = self.prompted or "controlnet" in self.pipe.components
        self.control = control_in(Path(pipeline)) if self.controlled else None
        if "prompt" in self.parameters:
            self.conditioning = "caption"
        elif "class_labels" in self.parameters and (self.num_classes or "class_labels" in needed):
            self.conditioning = "class"
        for name in needed:
            if name != KEYWORDS.get(self.conditioning):
                raise UserError(
                    f"{pipeline}: {type(self.pipe).__name__} needs {name!r}; only prompts or class labels "
                    "and noise can be given"
                )

    def calls(
        self, steps: Sequence[int], seeds: int, guidance_scale: float | None, num_images: int
    ) -> dict[int | None, dict[str, Any]]:
        if not steps or min(steps) < 1:
            raise UserError(f"steps: {list(steps)}; name at least one number of steps, each 1 or more")
        return {n: self.arguments(n, guidance_scale) for n in steps}

    def arguments(self, steps: int, guidance_scale: float | None) -> dict[str, Any]:
        """The call for that many steps: the entry of sampling.json, or num_inference_steps."""
        if str(steps) in self.sampling:
            out = dict(self.sampling[str(steps)])
        elif self.sampling and "default" not in self.sampling:
            there = ", ".join(self.sampling)
            raise UserError(f"steps: {self.name}/sampling.json has no {steps}; choose among {there}")
        else:
            out = {**self.sampling.get("default", {}), "num_inference_steps": steps}
        if guidance_scale is not None:
            out["guidance_scale"] = guidance_scale
        elif "guidance_scale" in self.parameters:
            out.setdefault("guidance_scale", self.parameters["guidance_scale"].default)
        for key in out:
            if key not in self.parameters:
                raise UserError(f"{self.name}: {type(self.pipe).__name__} takes no {key!r}; leave it out")
        if self.prompted and self.pipe.unet.config.time_cond_proj_dim is None and out["guidance_scale"] > 1:
            raise UserError(
                f"guidance_scale: {out['guidance_scale']} needs a picture to guide away from; set it to 1"
            )
        return out

    def quantise_by(self, rule: Callable[[Tensor], Tensor], name: str) -> None:
        self.quantise, self.quantisation = rule, name

    def evaluations(self) -> int:
        return self.evaluated

    def pictures(
        self,
        rows: range,
        inputs: Inputs,
        seed_block: int,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, float]:
        """Picture i has the noise seed seed_block * 1_000_000 + i.

        With an IP-Adapter one call a picture: stock pipelines show all image prompts of a call to each of its pictures.
        """
        parts = [range(i, i + 1) for i in rows] if self.prompted else [rows]
        calls = [self._call(part, inputs, seed_block, arguments) for part in parts]
        start = time.perf_counter()
        try:
            made = [pictures_of(self.pipe(**call)) for call in calls]
        except Exception as error:  # of the pipeline, its own code and the libraries below it
            raise UserError(self._reason(error)) from error
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.perf_counter() - start
        pictures = self._quantise(torch.cat([self._tensor(images) for images in made]))
        if len(pictures) != len(rows):
            kind = type(self.pipe).__name__
            raise UserError(
                f"{self.name}: {kind} gives {len(pictures)} pictures for {len(rows)} inputs; nothing to score"
            )
        side(self.name, pictures)
        return pictures, seconds

    def _call(
        self, rows: range, inputs: Inputs, seed_block: int, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed_block * SEED_STRIDE + i) for i in rows]
        call: dict[str, Any] = {"generator": generators, "output_type": "pt", **arguments}
        if self.conditioning in KEYWORDS:
            call[KEYWORDS[self.conditioning]] = inputs.of(rows)
        if self.conditioning == "none" or (self.conditioning == "class" and "batch_size" in self.parameters):
            call["batch_size"] = len(rows)
        if inputs.controlled:
            assert inputs.conditions is not None
            seen = inputs.conditions.of(rows, arguments.get("height") or self._side())
            call |= {"ip_adapter_image_embeds": [seen[:, None]]} if self.prompted else {"image": seen}
        return call

    def identity(self) -> str:
        """Hash of a folder's files; of a hub id, or with a LoRA, of the weights and configurations in memory."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        folder = Path(self.name)
        on_disk = folder.is_dir() and self.lora is None
        return hash_files(folder, _files(folder)) if on_disk else hash_parts(self.pipe)

    def _load_ip_adapter(self) -> None:
        """The adapter in the folder, which takes embeddings that are made here."""
        try:
            self.pipe.load_ip_adapter(
                self.name,
                subfolder=FOLDER,
                weight_name=FILE,
                image_encoder_folder=None,
                local_files_only=True,
            )
        except Exception as error:  # whatever diffusers or safetensors say about the file
            raise UserError(
                f"{self.name}: {FOLDER}/{FILE} cannot be loaded ({first_line(error)}); export it again"
            ) from error

    def _side(self) -> int:
        """Of pictures in pixels where the call names none."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def _count(self, module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        inputs = (*args, kwargs.get("sample"), kwargs.get("hidden_states"))
        self.evaluated += next(x for x in inputs if x is not None).shape[0]

    def _reason(self, error: Exception) -> str:
        """The line about an error of the pipeline's call."""
        kind, said = type(self.pipe).__name__, first_line(error)
        if isinstance(error, ValueError | TypeError | IndexError):  # the last: a label beyond the network's
            return f"{self.name}: {kind} refuses the call ({said})"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in said:
            return f"{self.name}: {kind} needs more memory than there is ({said}); lower --batch_size"
        named = said if said == type(error).__name__ else f"{type(error).__name__}: {said}"
        return f"{self.name}: {kind} fails ({named}); it must make pictures with diffusers alone first"

    def _tensor(self, images: Any) -> Tensor:
        """Pictures of a call as float (B, C, H, W). Raises UserError for anything else."""
        if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype.kind == "f":
            images = torch.from_numpy(images).permute(0, 3, 1, 2)  # DDPMPipeline and its kin know no "pt"
        pictures = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        if not pictures or images.shape[1] not in (1, 3):
            kind = type(self.pipe).__name__
            raise UserError(
                f"{self.name}: {kind} gives neither RGB nor grey pictures in [0, 1]; nothing to score"
            )
        return images

    def _quantise(self, images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise NotFinite(
                f"{self.name}: the pictures hold NaN or infinity; its weights or precision are unfit"
            )
        self.grey = images.shape[1] == 1
        return self.quantise(images).cpu().expand(-1, 3, -1, -1).contiguous()

    def describe(self) -> dict[str, Any]:
        folder = Path(self.name)
        added = f"+{Path(self.lora).name}" if self.lora is not None else ""
        return {
            "pipeline": (short(folder) if folder.is_dir() else self.name) + added,
            "pipeline_sha256": self.identity(),
            "pipeline_class": type(self.pipe).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
        }


def pictures_of(output: Any) -> Any:
    """What a call gives: pictures, or (B, C, H, W) of videos of one frame; None of anything else."""
    frames = getattr(output, "frames", None)
    if isinstance(frames, Tensor) and frames.ndim == 5 and frames.shape[1] == 1:
        return frames[:, 0]
    return getattr(output, "images", None)


def _num_classes(denoiser: Any) -> int | None:
    """Labels that a network knows by its configuration; None without."""
    config = getattr(denoiser, "config", None) or {}
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")


def hash_parts(pipe: Any) -> str:
    """sha256 of a loaded pipeline: its class, each component's class and configuration, every weight."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__}".encode())
        config: Any = getattr(part, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "_diffusers_version")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def quantise(images: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded to the nearest level and clipped."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _files(folder: Path) -> list[Path]:
    """What makes the pictures: components, index, sampling arguments, code; no model card, no reports."""
    top = [
        p for p in folder.iterdir() if p.name in ("model_index.json", "sampling.json") or p.suffix == ".py"
    ]
    return top + [
        p for d in folder.iterdir() if d.is_dir() and d.name[0] != "." for p in d.rglob("*") if p.is_file()
    ]
