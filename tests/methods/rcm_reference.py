"""Networks given by a formula, a teacher that is one of them, and rCM or DMD2 on both with given random numbers."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.process import NoiseProcess, RectifiedFlow, TrigFlow
from fewstep.distill.models import network_adapters
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor, nn


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


class Formula(nn.Module):
    """A network of (x, t); `config` as far as pixels need it."""

    config = SimpleNamespace(in_channels=1, sample_size=2, num_class_embeds=None)
    is_gradient_checkpointing = False


class Affine(Formula):
    """a x + b t + c."""

    def __init__(self, a: float, b: float, c: float):
        super().__init__()
        self.abc = nn.Parameter(double(a, b, c))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        a, b, c = self.abc
        return (a * x + b * column(t, x) + c,)


class GaussianTeacher(Formula):
    """F of TrigFlow for data N(0, s^2): x cos sin (1 - s^2) / V, V = s^2 cos^2 + sin^2."""

    def __init__(self, s: float):
        super().__init__()
        self.s = nn.Parameter(double(s))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        t = column(t, x)
        variance = self.s**2 * t.cos() ** 2 + t.sin() ** 2
        return (x * t.cos() * t.sin() * (1 - self.s**2) / variance,)


class GaussianConsistency(Formula):
    """F of the exact consistency function f = x s / sqrt(V)."""

    def __init__(self, s: float):
        super().__init__()
        self.s = nn.Parameter(double(s))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        t = column(t, x)
        variance = self.s**2 * t.cos() ** 2 + t.sin() ** 2
        return ((t.cos() - self.s / variance.sqrt()) * x / t.sin(),)


class Direct(Denoiser):
    """network(x, t), in whatever precision it is called."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t.to(x_t.dtype)), {}


network_adapters.ADAPTERS |= dict.fromkeys((Affine, GaussianTeacher, GaussianConsistency), Direct)  # type: ignore[arg-type]


class Frozen(Teacher):
    """A teacher without a pipeline."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.path, self.resolution = denoiser.requires_grad_(False), "formula", 2


def straight(network: nn.Module) -> Denoiser:
    return Direct(network, RectifiedFlow(), "velocity")


def spherical(network: nn.Module, process: NoiseProcess | None = None) -> Denoiser:
    return Direct(network, process or TrigFlow(), "trigflow")


class Script(Draws):
    """Normal numbers from a list; whatever else is drawn is as usual."""

    def __init__(self, *normals: Tensor):
        super().__init__(0, 0, range(len(normals[0]) if normals else 1))
        self.normals = list(normals)

    def normal(self, shape: Any) -> Tensor:
        out = self.normals.pop(0)
        assert tuple(out.shape[1:]) == tuple(shape)
        return out


def built(kind: Any, teacher: Denoiser, student: nn.Module | None = None, **settings: Any) -> Any:
    """A method with this teacher, whose student is a copy of it or the given network, all in float64."""
    method = kind(kind.Settings(**settings), Parts(Frozen(teacher), StudentSettings(), [], resolution=2))
    method.double()
    if student is not None:
        method.student.denoiser.network = student
    return method


def progress(iteration: int = 0, **updates: int) -> Progress:
    return Progress(iteration, 10_000, {"student": 0, "fake_score": 0, **updates})


def images(*values: float, rows: int = 1) -> Tensor:
    """(rows, 1, 1, n)."""
    return double(*values).view(rows, 1, 1, -1)


def normal_of(t: float, mean: float = -0.8, std: float = 1.6) -> Tensor:
    """The normal number whose lognormal time is t."""
    return double((math.log(math.tan(t)) - mean) / std)


def batch_of(draws: Draws, x0: Tensor) -> Batch:
    return Batch(draws, images=x0)
