"""sCM and rCM of Gaussian data: the exact consistency function is a fixed point, and a linear student finds it."""

import math
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.derivative import DERIVATIVES
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.process import TrigFlow
from fewstep.distill.methods.score_distillation.rcm import RCM, tangent
from fewstep.distill.methods.score_distillation.settings import RCMSettings
from rcm_reference import (
    Formula,
    GaussianConsistency,
    GaussianTeacher,
    batch_of,
    built,
    column,
    progress,
    spherical,
)
from torch import Tensor, nn

NOTHING = Condition({}, {})


def method_of(student: nn.Module | None, s: float = 0.5, **settings: Any) -> RCM:
    return built(
        RCM, spherical(GaussianTeacher(s)), student, **{"score_weight": 0.0, "derivative": "math", **settings}
    )


def tangent_of(method: RCM, x: Tensor, t: Tensor, form: Any = "code") -> Tensor:
    """g at r = 1, by the method's own parts."""
    found: list[Tensor] = []
    squares = method.squares
    method.squares = lambda seen, g: found.append(g) or squares(seen, g)  # type: ignore[method-assign]
    method.noised = lambda *_: (x, torch.zeros_like(x))  # type: ignore[method-assign]
    law = {"p_mean": (method.process.sigma_data * t[0].tan()).log().item(), "p_std": 1e-18}
    method.settings = RCMSettings(**{**vars(method.settings), **law, "tangent_form": form})
    method("student", batch_of(Draws(0, 0, range(len(x))), x), progress(), {})
    return found[0]


@pytest.mark.parametrize("form", ["code", "paper", "scm"])
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("t", [0.3, 0.9, 1.5])
def test_the_tangent_vanishes_at_the_exact_consistency_function(t: float, derivative: str, form: str) -> None:
    x = torch.randn(3, 1, 2, 2).double()
    method = method_of(GaussianConsistency(0.5), derivative=derivative, derivative_step=1e-4)
    g = tangent_of(method, x, torch.full((3,), t).double(), form)
    assert g.abs().max().item() < (1e-7 if derivative == "finite_difference" else 1e-14)


@pytest.mark.parametrize(("t", "recorded"), [(0.3, -0.70906685), (0.9, -0.24134523), (1.5, -0.01777315)])
def test_recorded_tangent_of_the_teacher_itself(t: float, recorded: float) -> None:
    g = tangent_of(method_of(None), torch.ones(1, 1, 2, 2).double(), torch.tensor([t], dtype=torch.float64))
    assert g.flatten().tolist() == pytest.approx([recorded] * 4, abs=1e-8)


@pytest.mark.parametrize("wrong", ["not scaled", "scaled twice", "time alone", "state alone", "own velocity"])
def test_wrong_directions_of_the_derivative_do_not_vanish(wrong: str) -> None:
    """Trap 1: along (c s F_T, c s), and not multiplied again; along the teacher's velocity, not the student's."""
    student, teacher = GaussianConsistency(0.5), GaussianTeacher(0.5)
    x, t = torch.randn(4, 1, 2, 2).double(), torch.full((4,), 0.9, dtype=torch.float64)
    scale = math.cos(0.9) * math.sin(0.9)
    with torch.no_grad():
        f_t, f_s = teacher(x, t)[0], student(x, t)[0]
        along = {
            "not scaled": (f_t, torch.ones_like(t)),
            "time alone": (0 * f_t, scale * torch.ones_like(t)),
            "state alone": (scale * f_t, 0 * t),
            "own velocity": (scale * f_s, scale * torch.ones_like(t)),
        }.get(wrong, (scale * f_t, scale * torch.ones_like(t)))
        j = torch.func.jvp(lambda x, t: student(x, t)[0], (x, t), along)[1]
        right = torch.func.jvp(
            lambda x, t: student(x, t)[0], (x, t), (scale * f_t, scale * torch.ones_like(t))
        )[1]
        j = scale * j if wrong == "scaled twice" else j
    assert tangent("code", 1.0, x, t, f_s, f_t, right).abs().max() < 1e-14
    assert tangent("code", 1.0, x, t, f_s, f_t, j).abs().max() > 1e-3


class Linear(Formula):
    """F = a(t) x, a a small network of Fourier features of t."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1)).double()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        angles = t[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
        a = self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))
        return (column(a[:, 0], x) * x,)


@pytest.mark.parametrize(
    ("source", "steps", "bound"),
    [("teacher", 250, 0.08), pytest.param("data", 800, 0.15, marks=pytest.mark.slow)],
)
def test_a_linear_student_learns_the_consistency_function(source: str, steps: int, bound: float) -> None:
    """f(1, t) = s / sqrt(V) at 30 times: at first off by more than 0.4. The velocity of single samples is noisy."""
    torch.manual_seed(0)
    s, student = 0.5, Linear()
    method = method_of(student, s, source=source, scm_weight=1.0, p_mean=-0.4, p_std=1.2)
    optimiser = torch.optim.Adam(student.parameters(), 1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    t = torch.linspace(0.05, math.pi / 2, 30, dtype=torch.float64)
    exact = s / (s**2 * t.cos() ** 2 + t.sin() ** 2).sqrt()

    def error() -> float:
        with torch.no_grad():
            f = method.denoiser(torch.ones(30, 1, 1, 1).double(), t, NOTHING).x0.flatten()
        return (f - exact).abs().max().item()

    start, rates = error(), []
    for i in range(steps):
        x0 = s * torch.randn(64, 1, 2, 2).double()
        out = method("student", batch_of(Fast(i, 64), x0), progress(i), {})
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        schedule.step()
        rates.append(out["log_rate"].item())
    assert start > 0.4 and error() < bound
    if source == "teacher":
        assert sum(rates[-20:]) / 20 < sum(rates[:20]) / 20 - 1


class Fast(Draws):
    """One generator for all rows."""

    def __init__(self, seed: int, rows: int):
        super().__init__(0, 0, [])
        self.generator, self.count = torch.Generator().manual_seed(seed), rows

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)


def test_scale_of_the_data_is_that_of_the_process() -> None:
    """Data of half the size in TrigFlow(0.5): the same g, in units of F."""
    x, t = torch.randn(3, 1, 2, 2).double(), torch.full((3,), 0.7, dtype=torch.float64)
    whole = tangent_of(method_of(None), x, t)
    process = TrigFlow(0.25)
    scaled = built(
        RCM, spherical(GaussianTeacher(0.5), process), score_weight=0.0, sigma_data=0.25, derivative="math"
    )
    torch.testing.assert_close(tangent_of(scaled, 0.25 * x, t), 0.25 * whole)
