"""Degraded held-out pictures and what restorers make of them: paired distances, and KID to real pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ..config.run import RunConfig
from ..diffusion.draws import Draws
from ..diffusion.generator import fresh_from
from ..errors import UserError
from ..methods.restoration.degradation import Degradation, enlarged
from ..methods.restoration.restorer import Restorer
from ..methods.restoration.settings import InterLCMSettings
from ..metrics.extractor import Extractor, extract
from ..metrics.features import make_extractor
from ..metrics.kid import DEFINITION, kid, mean_sd
from ..metrics.reference import reference
from ..models.teacher import LatentTeacher, Teacher
from ..scorers.vision import ImageDistance, Vision
from ..settings import DistanceName
from ..training.grid import to_uint8
from .loading import load_pipeline
from .pipeline_source import SEED_STRIDE

Restore = Callable[[Tensor, list[torch.Generator]], Tensor]
METRICS = {
    "psnr": "PSNR, dB",
    "distance": "feature distance",
    "kid": "KID",
}


@dataclass(frozen=True)
class Row:
    """A restorer: name; steps, its network evaluations, None where there are none; restore: degraded pictures
    (B, 3, H, W) in [-1, 1] and a generator for each to restored ones."""

    name: str
    steps: int | None
    restore: Restore


@dataclass(frozen=True)
class Setting:
    """What is restored and how it is scored; pictures uint8 (N, 3, H, W), clean ones in a fixed random order."""

    clean: Tensor
    real: Tensor
    degradation: Degradation
    extractor: Extractor
    distance: ImageDistance
    seeds: int
    batch_size: int


def benchmark(
    config: RunConfig,
    restorers: Sequence[str],
    *,
    split: str,
    num_images: int,
    seeds: int,
    batch_size: int,
    extractor: str,
    distance: DistanceName,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report of a configuration of `interlcm`, and the first pictures of every row by title, in [-1, 1].

    Its student alone from each intermediate state, told the empty prompt, stands beside `restorers`, folders of
    RestorationPipeline or of the runs that made them. UserError for another method, and for a folder without one.
    """
    if config.method["name"] != "interlcm" or config.teacher is None:
        raise UserError(
            f"method.name: {config.method['name']} restores nothing; give a configuration of interlcm"
        )
    chosen: InterLCMSettings = config.method.settings
    teacher = Teacher.load(config.teacher, config.resolution)
    if not isinstance(teacher, LatentTeacher):
        raise UserError(f"teacher.path: {config.teacher.path} works on pixels; give a latent student")
    teacher.to(device, torch.float32)
    options = {"caption_column": config.data.caption_column, "center_crop": config.data.center_crop}
    clean, real = (
        reference(config.data.name, s, teacher.resolution, options)[0] for s in (split, config.data.split)
    )
    setting = Setting(
        clean[:num_images], real, Degradation(**vars(chosen.degradation)), make_extractor(extractor).to(device),
        Vision().distance(distance).to(device), seeds, batch_size,
    )  # fmt: skip
    student = Restorer(
        teacher, chosen.num_steps, timesteps=chosen.timesteps, guidance_scale=chosen.guidance_scale
    )
    rows = [*student_rows(student), *(row for folder in restorers for row in folder_rows(folder, device))]
    scores, pictures = measured(setting, rows, teacher, device)
    protocol = {
        "student": Path(config.teacher.path).name,
        "timesteps": student.timesteps,
        "degradation": chosen.degradation.__dict__,
        "data": f"{config.data.name}, split {split}, {len(setting.clean)} pictures of {teacher.resolution} px",
        "seeds": f"{seeds}, each with its own degradation and noise; mean and standard deviation over them",
        "psnr": "of 8-bit RGB pictures, mean over pictures",
        "distance": f"{distance}, mean over pictures",
        "kid": f"{extractor} to split {config.data.split} ({len(real)} pictures): {DEFINITION}",
    }
    return {"protocol": protocol, "rows": scores}, pictures


def measured(
    setting: Setting, rows: Sequence[Row], teacher: LatentTeacher, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Scores of the degraded pictures, their bicubic enlargement, the clean ones through the autoencoder, the rows."""
    found: dict[str, list[dict[str, float]]] = {}
    shown: dict[str, Tensor] = {"clean": setting.clean[:8].float() / 127.5 - 1}
    real, count = extract(setting.extractor, setting.real), len(setting.clean)
    unit, side = setting.clean.float() / 255, setting.clean.shape[-1]
    for seed in range(setting.seeds):
        small = setting.degradation.small(unit, Draws(seed, 0, range(count)))
        degraded, bicubic = (2 * enlarged(small, side, by) - 1 for by in (cv2.INTER_LINEAR, cv2.INTER_CUBIC))
        through = batched(lambda x, _: decoded(teacher, x), 2 * unit - 1, seed, setting.batch_size, device)
        outputs = {"degraded": degraded, "bicubic": bicubic, "clean, autoencoder": through}
        for row in rows:
            outputs[row.name] = batched(row.restore, degraded, seed, setting.batch_size, device)
        for name, images in outputs.items():
            found.setdefault(name, []).append(scored(to_uint8(images), setting, real, device))
            if seed == 0:
                shown[name] = images[:8]
    steps = {row.name: row.steps for row in rows}
    table = [
        {"name": name, "steps": steps.get(name), **{m: mean_sd([v[m] for v in values]) for m in METRICS}}
        for name, values in found.items()
    ]
    return table, shown


def scored(images: Tensor, setting: Setting, real: Tensor, device: torch.device) -> dict[str, float]:
    """Of uint8 pictures against the clean ones of the same rows, and `real` features."""
    psnr = peak_signal_noise_ratio(
        images.double(), setting.clean.double(), data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean"
    )
    pairs = zip(images.split(setting.batch_size), setting.clean.split(setting.batch_size), strict=True)
    with torch.no_grad():
        apart = torch.cat([
            setting.distance(*(x.to(device).float() / 127.5 - 1 for x in pair)).cpu() for pair in pairs
        ])  # fmt: skip
    features = extract(setting.extractor, images, setting.batch_size)
    return {"psnr": float(psnr), "distance": float(apart.mean()), "kid": kid(real, features)}


@torch.no_grad()
def batched(restore: Restore, images: Tensor, seed: int, size: int, device: torch.device) -> Tensor:
    """Picture i has the noise seed `seed` * 1,000,000 + i, whatever the batch."""
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        generators = [torch.Generator().manual_seed(seed * SEED_STRIDE + start + i) for i in range(len(part))]
        parts.append(restore(part.to(device), generators).float().cpu())
    return torch.cat(parts)


def decoded(teacher: LatentTeacher, images: Tensor) -> Tensor:
    return teacher.decode(teacher.mean_latents(teacher.posterior(images)))


def student_rows(student: Restorer) -> list[Row]:
    """The student from each of its intermediate states, told the empty prompt."""

    def row(start: int) -> Row:
        def restore(images: Tensor, generators: list[torch.Generator]) -> Tensor:
            told = student.teacher.condition([""] * len(images)).to(images.device)
            z = student.latents(images)
            return student.teacher.decode(student(z, told, fresh_from(generators), start))

        return Row(f"img2img from t = {student.timesteps[start]}", len(student.timesteps) - start, restore)

    return [row(start) for start in range(1, len(student.timesteps))]


def folder_rows(folder: str, device: torch.device) -> list[Row]:
    """An exported restorer as its sampling.json calls it, without and with the wavelet colour fix."""
    run = Path(folder)
    place = run / "pipeline" if (run / "pipeline").is_dir() else run
    if not (place / "restoration.json").is_file():
        raise UserError(
            f"restorer: {folder} holds no restorer; train it by `fewstep distill`, or give the folder of "
            "another run of interlcm, or none"
        )
    pipe, sampling = load_pipeline(str(place), False)
    pipe.to(device).set_progress_bar_config(disable=True)
    steps, call = next(iter(sampling.items()))

    def row(fix: str) -> Row:
        def restore(images: Tensor, generators: list[torch.Generator]) -> Tensor:
            out = pipe(images / 2 + 0.5, generator=generators, colour_fix=fix, output_type="pt", **call)
            return 2 * out.images - 1

        name = run.parent.name if run.name == "pipeline" else run.name
        return Row(name if fix == "none" else f"{name}, {fix}", int(steps), restore)

    return [row("none"), row("wavelet")]


def as_markdown(report: Mapping[str, Any]) -> str:
    lines = [
        "| | steps | " + " | ".join(METRICS.values()) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    for row in report["rows"]:
        digits = {"psnr": 2, "distance": 4, "kid": 4}
        cells = [printed(row[m], digits[m]) for m in METRICS]
        lines.append(f"| {row['name']} | {row['steps'] or '-'} | " + " | ".join(cells) + " |")
    notes = [f"- {key}: {value}" for key, value in report["protocol"].items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def printed(score: tuple[float, float | None], digits: int) -> str:
    mean, sd = score
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
