"""MeanFlow of Gaussian data, whose mean velocity is known: the loss at it, its identity, sampling, and learning it."""

from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.derivative import total_derivative
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import mean_velocity_sample
from fewstep.distill.diffusion.process import RectifiedFlow
from meanflow_reference import MLP, Direct, ExactMean, Gaussian, Known, meanflow_on, run
from torch import Tensor, nn

NOTHING = Condition({}, {})


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("m", "s", "z", "r", "t", "moved", "velocity", "mean"),
    [
        (0.5, 0.5, 1.2, 0.3, 0.8, 0.9789490624, 0.7692307692, 0.4421018752),
        (2.0, 0.1, -0.7, 0.2, 0.9, 1.3846067032, -2.9987655845, -2.9780095760),
    ],
)
def test_recorded_values_of_the_exact_field(
    m: float, s: float, z: float, r: float, t: float, moved: float, velocity: float, mean: float
) -> None:
    field, (z_, r_, t_) = Gaussian(m, s), double(z, r, t)
    assert field.moved(z_, t_, r_).item() == pytest.approx(moved, abs=1e-10)
    assert field.velocity(z_, t_).item() == pytest.approx(velocity, abs=1e-10)
    assert field.mean_velocity(z_, t_, r_).item() == pytest.approx(mean, abs=1e-10)


def test_the_identity_by_our_derivative() -> None:
    """u = v - (t - r) du/dt, with the recorded du/dt at (0.3, 0.8)."""
    field = Gaussian(0.5, 0.5)
    z, r, t = double(1.2, -0.4, 0.1), double(0.3, 0.1, 0.0), double(0.8, 0.5, 1.0)
    v, u = field.velocity(z, t), field.mean_velocity(z, t, r)
    rate = total_derivative(lambda z, r, t: field.mean_velocity(z, t, r), z, r, t, v)
    assert rate[0].item() == pytest.approx(0.6542577880, abs=1e-10)
    torch.testing.assert_close(u, v - (t - r) * rate, rtol=0, atol=1e-14)
    one = field.mean_velocity(double(1.2), double(1.0), double(0.0))
    assert one.item() == pytest.approx(0.1, abs=1e-12)


class Boxed(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class ExactVelocity(Denoiser):
    """The instantaneous velocity of Gaussian data: a perfect teacher."""

    def __init__(self, m: float | Tensor, s: float | Tensor):
        super().__init__(Boxed(), RectifiedFlow(), "velocity")
        self.field = Gaussian(m, s)

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (self.field.velocity(x_t, t.view(-1, 1)).to(x_t.dtype),), {}


def taught(network: nn.Module, **settings: Any) -> Any:
    """MeanFlow whose velocity is the exact one in place of a teacher's, 64 samples, 16 of them with r = t."""
    t = torch.rand(64, dtype=torch.float64) * 0.9 + 0.05
    r = torch.where(torch.arange(64) < 16, t, t * torch.rand(64, dtype=torch.float64))
    method = meanflow_on(network, (r, t), norm_p=0.0, **settings)
    method.__dict__["source"] = ExactVelocity(0.5, 0.5)
    return method


def exact_loss(tangent: str = "velocity", derivative: str = "kernel") -> tuple[Tensor, tuple[Tensor, ...]]:
    network = ExactMean(0.5, 0.5)
    method = taught(network, tangent=tangent, derivative=derivative, derivative_step=1e-4)
    x0, eps = 0.5 + 0.5 * torch.randn(64, 1).double(), torch.randn(64, 1).double()
    loss = run(method, x0, Known(eps))["loss"]
    return loss, torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("tangent", ["velocity", "student"])
@pytest.mark.parametrize("derivative", ["kernel", "math", "double_backward", "finite_difference"])
def test_loss_and_gradient_vanish_at_the_exact_solution(derivative: str, tangent: str) -> None:
    loss, gradient = exact_loss(tangent, derivative)
    tolerance = 1e-7 if derivative == "finite_difference" else 1e-14
    assert loss.item() < tolerance**2 * 1e4
    assert max(g.abs().item() for g in gradient) < tolerance * 10


@pytest.mark.parametrize("change", ["sign", "order", "frozen", "no_rate"])
def test_loss_does_not_vanish_with_a_wrong_derivative(change: str) -> None:
    network = ExactMean(0.5, 0.5)
    method = taught(network)
    rate = method.rate

    def wrong(z: Tensor, r: Tensor, t: Tensor, tangent: Tensor, told: Condition) -> Tensor:
        if change == "sign":
            return -rate(z, r, t, tangent, told)
        if change == "no_rate":
            return torch.zeros_like(z)
        along = (tangent, torch.ones_like(r), torch.zeros_like(t))
        if change == "frozen":
            along = (torch.zeros_like(tangent), torch.zeros_like(r), torch.ones_like(t))
        network.requires_grad_(False)
        out = torch.func.jvp(lambda z, r, t: network(z, t, t - r)[0], (z, r + 1e-6 * (r == t), t), along)[1]
        network.requires_grad_(True)
        return out

    method.rate = wrong
    x0, eps = 0.5 + 0.5 * torch.randn(64, 1).double(), torch.randn(64, 1).double()
    loss = run(method, x0, Known(eps))["loss"]
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    assert loss.item() > 1e-3 and max(g.abs().item() for g in gradient) > 1e-3


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_exact_mean_velocity_reaches_the_data_in_any_number_of_steps(num_steps: int) -> None:
    denoiser = Direct(ExactMean(0.5, 0.5), RectifiedFlow(), "velocity")
    noise = double(1.2, -0.3, 0.0)[:, None].float()
    times = [1 - i / num_steps for i in range(num_steps + 1)]
    x = mean_velocity_sample(denoiser, noise, NOTHING, times)
    torch.testing.assert_close(x, 0.5 + 0.5 * noise, rtol=0, atol=2e-6)


class Mixture(nn.Module):
    """The velocity of data at +-1.5 with standard deviation 0.2, from the posterior of the two modes."""

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor]:
        t = t.view(-1, 1)
        spread = (1 - t) ** 2 * 0.04 + t**2
        logits = torch.stack([-((z - (1 - t) * m) ** 2) / (2 * spread) for m in (-1.5, 1.5)])
        modes = [-m + (t - (1 - t) * 0.04) / spread * (z - (1 - t) * m) for m in (-1.5, 1.5)]
        return ((logits.softmax(0) * torch.stack(modes)).sum(0),)


def test_recorded_values_of_two_modes_and_of_their_flow() -> None:
    """Many steps of instantaneous velocities follow the flow; one of them does not."""
    denoiser = Direct(Mixture(), RectifiedFlow(), "velocity")
    z, t = double(0.3, -1.0)[:, None], double(0.5, 0.9)
    found = denoiser(z, t, NOTHING).velocity[:, 0]
    torch.testing.assert_close(found, double(-1.4625622319, -0.8007630704), rtol=0, atol=1e-9)
    noise = double(0.3)[:, None]
    many = mean_velocity_sample(denoiser, noise, NOTHING, [1 - i / 2000 for i in range(2001)])
    assert many.item() == pytest.approx(1.3560391695, abs=2e-3)
    assert abs(mean_velocity_sample(denoiser, noise, NOTHING, [1.0, 0.0]).item() - 1.356) > 0.5


def learned(direction: Any = None, teacher: bool = False, **settings: Any) -> tuple[float, float]:
    """RMSE of u(z, 0, 1) and of u at random (r, t) after training on data N((1, -0.5), (0.5, 0.1)^2)."""
    torch.manual_seed(0)
    mean, spread = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.1])
    field, network = Gaussian(mean, spread), MLP()
    method = meanflow_on(network, **settings)
    if teacher:
        method.__dict__["source"] = ExactVelocity(mean, spread)
    if direction is not None:
        rate = method.rate
        method.rate = lambda *a: direction(network, rate, *a)  # type: ignore[method-assign]
    average = {k: p.detach().clone() for k, p in network.named_parameters()}
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(3000):
        x0, eps = mean + spread * torch.randn(256, 2), torch.randn(256, 2)
        loss = run(method, x0, Fast(eps))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in network.parameters()], 0.005)

    def error(z: Tensor, r: Tensor, t: Tensor) -> float:
        u = torch.func.functional_call(network, average, (z, t, t - r))[0].detach()
        exact = field.mean_velocity(z.double(), t.double()[:, None], r.double()[:, None])
        return (u - exact).square().mean().sqrt().item()

    x0, z = mean + spread * torch.randn(2000, 2), torch.randn(2000, 2)
    r, t = (torch.rand(2, 2000) * 0.98).sort(0).values
    t = t + 0.02
    return error(z, torch.zeros(2000), torch.ones(2000)), error(torch.lerp(x0, z, t[:, None]), r, t)


class Fast(Draws):
    """The same laws from one generator: rows need not be independent of the batch here."""

    def __init__(self, eps: Tensor):
        super().__init__(0, 0, range(0))
        self.eps = eps

    def normal(self, shape: Any) -> Tensor:
        return self.eps if len(shape) else torch.randn(len(self.eps))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(len(self.eps))


def against(direction: tuple[int, int, int]) -> Any:
    """A derivative along (a v, b, c) in (z, r, t)."""

    def rate(
        network: nn.Module, own: Any, z: Tensor, r: Tensor, t: Tensor, tangent: Tensor, *_: Any
    ) -> Tensor:
        weights = {k: p.detach() for k, p in network.named_parameters()}
        a, b, c = direction
        along = (a * tangent, b * torch.ones_like(r), c * torch.ones_like(t))
        return torch.func.jvp(
            lambda z, r, t: torch.func.functional_call(network, weights, (z, t, t - r))[0], (z, r, t), along
        )[1]

    return rate


def reversed_sign(network: nn.Module, own: Any, *arguments: Any) -> Tensor:
    return -own(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "at_random"),
    [
        ({"ratio": 0.25}, 0.2),
        ({"ratio": 0.5, "tangent": "student"}, 0.2),
        ({"ratio": 0.75, "teacher": True}, 0.08),
    ],
)
def test_the_mean_velocity_is_learned(settings: dict[str, Any], at_random: float) -> None:
    """0.25, 0.25 and 0.22 recorded at (0, 1); 0.15, 0.15 and 0.05 at random times."""
    at_noise, elsewhere = learned(**settings)
    assert at_noise < 0.35 and elsewhere < at_random


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.0},
        {"ratio": 0.25, "direction": against((1, 0, 0))},
        {"ratio": 0.25, "direction": against((1, 1, 0))},
        {"ratio": 0.25, "direction": reversed_sign},
    ],
)
def test_it_is_not_learned_without_the_derivative_or_with_a_wrong_one(settings: dict[str, Any]) -> None:
    """0.75, 0.51, 0.77 and 3.7 recorded: flow matching alone, a frozen time, (r, t) swapped, the wrong sign."""
    assert learned(**settings)[0] > 0.45
