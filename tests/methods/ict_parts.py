"""What the tests of consistency training share: tiny real networks, methods and batches, and second formulas."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, StableDiffusionPipeline, UNet2DModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.consistency_training.settings import ICTSettings
from fewstep.distill.models.teacher import LatentTeacher, PixelTeacher
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from fewstep.pipelines.pipeline_edm import EDMPipeline
from torch import Tensor, nn

GREY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "add_attention": False,
}
COLOUR = {**GREY, "in_channels": 3, "out_channels": 3}
CLASSES = ("bag", "coat", "shirt")
LATENT = {
    "sigma_min": 0.03,
    "sigma_max": 14.6,
    "sigma_data": 0.7,
    "two_step_sigma": 0.9,
}  # within its VP's reach
CAPTIONS = ["red cat", "dog", "cat", "red dog", "a red red dog", "go"]


def pixel_teacher(network: dict[str, Any] = GREY, seed: int = 1, **edm: float) -> PixelTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = EDMPipeline(UNet2DModel(**network), CMStochasticIterativeScheduler(**edm))
    return PixelTeacher(pipeline, "tiny")


def pixel_ict(
    *,
    network: dict[str, Any] | None = GREY,
    teacher: PixelTeacher | None = None,
    classes: tuple[str, ...] = (),
    dropout: float | None = None,
    **settings: Any,
) -> ICT:
    """From new weights of `network`; with None, from the teacher's."""
    student = StudentSettings(
        init="teacher" if network is None else "scratch", network=network, dropout=dropout
    )
    method = ICT(ICTSettings(**settings), Parts(teacher, student, [], classes, 8))
    method.train()
    return method


@cache
def latent_teacher(folder: Path, prediction: str = "epsilon") -> LatentTeacher:
    """Shared by the tests: nothing may change it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    return LatentTeacher(pipeline, str(folder))


def latent_ict(
    folder: Path, *, prediction: str = "epsilon", student: StudentSettings | None = None, **settings: Any
) -> ICT:
    parts = Parts(latent_teacher(folder, prediction), student or StudentSettings(), [])
    method = ICT(ICTSettings(**{**LATENT, **settings}), parts)
    method.train()
    return method


@torch.no_grad()
def shaken(method: ICT, size: float = 0.05, seed: int = 3) -> ICT:
    """The student and an averaged target moved away from the teacher and from each other."""
    generator = torch.Generator().manual_seed(seed)
    averages = [] if method.target is None else list(method.target.tensors().values())
    for p in [*method.student.trained().values(), *averages]:
        p.add_(size * torch.randn(p.shape, generator=generator))
    return method


def pixel_batch(method: ICT, rows: range = range(4), iteration: int = 0) -> Batch:
    """Pictures of 8 px, with labels where the method has classes; of the whole batch, these rows."""
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    condition = None
    if "labels" in method.needs:
        condition = Condition({"class_labels": torch.arange(8)[rows.start : rows.stop] % len(CLASSES)}, {})
    return Batch(Draws(5, iteration, rows), images=images[rows.start : rows.stop], condition=condition)


def latent_batch(method: ICT, rows: range = range(6)) -> Batch:
    teacher = method.parts.teacher
    assert isinstance(teacher, LatentTeacher)
    mean, logvar = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    chosen = slice(rows.start, rows.stop)
    posterior = torch.cat([5 * mean, logvar - 1], dim=1)[chosen]
    return Batch(Draws(5, 0, rows), latents=posterior, condition=teacher.condition(CAPTIONS[chosen]))


def at(iteration: int, total: int = 400) -> Progress:
    return Progress(iteration, total, {"student": iteration})


def step(method: ICT, batch: Batch, progress: Progress | None = None) -> dict[str, Tensor]:
    """One forward with the dropout masks of seed 7."""
    torch.manual_seed(7)
    return method("student", batch, progress or at(0), {})


def gradients(method: ICT) -> dict[str, Tensor]:
    return {k: torch.zeros(()) if p.grad is None else p.grad for k, p in method.student.trained().items()}


# A second implementation, written from the formulas. `network` is (x, time) -> output; levels are (B, 1, 1, 1).

Function = Callable[[Tensor, Tensor], Tensor]


def levels(num_points: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """sigma_N > ... > sigma_1, in the decreasing order of the public code."""
    share = torch.arange(num_points, dtype=torch.float64) / (num_points - 1)
    return (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def edm_denoiser(network: Function, sd: float = 0.5) -> Function:
    def denoise(x: Tensor, s: Tensor) -> Tensor:
        output = network((1 / (s**2 + sd**2).sqrt()).float() * x, (250 * s.log()).float().flatten())
        return (sd**2 / (s**2 + sd**2)).float() * x + (s * sd / (s**2 + sd**2).sqrt()).float() * output

    return denoise


def consistency(network: Function, low: float = 0.002, sd: float = 0.5) -> Function:
    """c_skip x + c_out F with the boundary at `low`."""

    def function(x: Tensor, s: Tensor) -> Tensor:
        output = network((1 / (s**2 + sd**2).sqrt()).float() * x, (250 * s.log()).float().flatten())
        c_skip, c_out = sd**2 / ((s - low) ** 2 + sd**2), sd * (s - low) / (s**2 + sd**2).sqrt()
        return c_skip.float() * x + c_out.float() * output

    return function


def heun(denoise: Function, x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    slope = (x - denoise(x, high)) / high.float()
    ahead = x + (low - high).float() * slope
    second = (ahead - denoise(ahead, low)) / low.float()
    return x + (low - high).float() * (slope + second) / 2


def copied(network: nn.Module, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """An independent network of the same configuration, in training mode, with the given weights or its own."""
    other = type(network).from_config(network.config)
    other.load_state_dict({k: v.detach().clone() for k, v in (weights or network.state_dict()).items()})
    return other.train()
