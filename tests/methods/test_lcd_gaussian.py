"""Latent consistency distillation of unit Gaussian latents: the exact teacher and the student it leads to are known."""

from collections.abc import Callable

import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.training.contract import Batch, Progress
from torch import Tensor, nn

Build = Callable[..., LCD]
SCALING_FACTOR = 0.18215


def alphas_cumprod() -> Tensor:
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


def loss_of(method: LCD, batch: Batch) -> Tensor:
    return method("student", batch, Progress(0, 10, {"student": 0}), {})["loss"]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class ExactTeacher(Denoiser):
    """eps = sigma(t) x: data N(0, 1), whatever the prompt."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (self.process.sigma(t).to(x_t.dtype).view(-1, 1, 1, 1) * x_t,), {}


class Slopes(nn.Module):
    """x0 = a(t) x with one parameter for each of the 1000 times."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1000))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.a[t.long()].view(-1, 1, 1, 1) * x,)


class LinearStudent(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


def gaussian(build_lcd: Build) -> tuple[LCD, Slopes, Batch]:
    """LCD between the two, on latents whose posterior is N(0, 1/scaling_factor^2): z0 is unit Gaussian."""
    method = build_lcd(distance="l2", target_decay=None)
    slopes = Slopes()
    method.teacher.denoiser = ExactTeacher(Nothing(), method.process, "epsilon")  # type: ignore[assignment]
    method.function = ConsistencyFunction(LinearStudent(slopes, method.process, "sample"))
    rows = 400
    posterior = torch.zeros(rows, 8, 1, 1)
    posterior[:, 4:] = -2 * torch.tensor(SCALING_FACTOR).log()
    empty = Condition(
        {"encoder_hidden_states": torch.zeros(rows, 1, 1)}, {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    )
    return method, slopes, Batch(Draws(0, 0, range(rows)), latents=posterior, condition=empty)


def cosines(method: LCD) -> Tensor:
    """prod cos(theta_i - theta_{i-1}) over the levels 0, 19, 39, ..., 999; theta = arctan(sigma/alpha)."""
    abar = alphas_cumprod().double()[[0, *range(19, 1000, 20)]]
    theta = torch.atan2((1 - abar).sqrt(), abar.sqrt())
    return (theta[1:] - theta[:-1]).cos().cumprod(0)


def fresh(batch: Batch) -> Batch:
    return Batch(Draws(0, 0, range(400)), latents=batch.latents, condition=batch.condition)


def test_a_linear_student_of_gaussian_data_learns_the_products_of_cosines(build_lcd: Build) -> None:
    """The loss is quadratic in each slope, so one Newton step per level and sweep solves it; 50 sweeps carry the
    boundary a(0) = 1 through the 50 levels."""
    method, slopes, batch = gaussian(build_lcd)
    grid = torch.arange(19, 1000, 20)
    for _ in range(50):
        loss = loss_of(method, fresh(batch))
        (slope,) = torch.autograd.grad(loss, slopes.a, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), slopes.a)
        assert (curvature[grid] > 0).all()
        with torch.no_grad():
            slopes.a[grid] -= slope[grid] / curvature[grid]
    learned = slopes.a.detach()[[259, 519, 759, 999]]
    torch.testing.assert_close(learned, torch.tensor([0.9843, 0.9776, 0.9740, 0.9729]), rtol=0, atol=6e-5)
    torch.testing.assert_close(slopes.a.detach()[grid].double(), cosines(method), rtol=0, atol=2e-5)


def test_loss_and_gradient_vanish_at_the_closed_form_and_not_beside_it(build_lcd: Build) -> None:
    method, slopes, batch = gaussian(build_lcd)
    slopes.a.data[19::20] = cosines(method).float()
    loss = loss_of(method, fresh(batch))
    (slope,) = torch.autograd.grad(loss, slopes.a)
    assert loss.item() < 1e-10 and slope.abs().max() < 1e-6
    slopes.a.data[19::20] = 1.0
    loss = loss_of(method, fresh(batch))
    assert loss.item() > 1e-7
    (slope,) = torch.autograd.grad(loss, slopes.a)
    assert slope[19::20].min() > 0
