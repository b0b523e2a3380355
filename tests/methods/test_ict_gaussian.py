"""Consistency training where the answers are known: Gaussian data, a point mass, and a toy of two modes."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction, edm_boundary
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.ema import EMA
from fewstep.distill.diffusion.generator import Generator
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.training.contract import Batch
from torch import Tensor, nn

from .ict_parts import at, pixel_ict, pixel_teacher

NONE = Condition({}, {})
PLAIN = {"distance": "l2", "weighting": "uniform", "curriculum": "constant", "noise": "uniform"}


class Nothing(nn.Module):
    def forward(self, output: Tensor) -> tuple[Tensor]:
        return (output,)


class ExactTeacher(Denoiser):
    """D of data N(0, 0.5^2)."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t * (0.25 / (0.25 + t**2)).view(-1, 1, 1, 1),), {}


class Flow(nn.Module):
    """f* of data N(0, 0.5^2): down the probability flow to sigma_min; `slope` bends it."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, weights: Any = None) -> Tensor:
        ratio = ((0.25 + 0.002**2) / (0.25 + t**2)).sqrt() ** self.slope
        return ratio.view(-1, 1, 1, 1) * x


def distilled(**settings: Any) -> tuple[ICT, Flow]:
    method = pixel_ict(teacher=pixel_teacher(), ode_source="teacher", **{**PLAIN, **settings})
    method.parts.need_teacher().denoiser = ExactTeacher(Nothing(), method.process, "sample")
    flow = Flow()
    method.function = flow  # type: ignore[assignment]
    return method, flow


def loss_of(method: ICT) -> Tensor:
    """The mean over all pairs of the grid."""
    sigmas = method.process.grid(method.settings.num_points)
    method.pairs = lambda batch, progress: (sigmas[:-1], sigmas[1:])  # type: ignore[method-assign]
    rows = len(sigmas) - 1
    images = 0.5 * torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(Draws(0, 0, range(rows)), images=images.double().expand(-1, 3, -1, -1))
    return method("student", batch, at(0), {})["loss"]


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_distillation_loss_of_the_true_function_vanishes_as_levels_multiply(
    solver: str, order: int
) -> None:
    """A step of a solver of order p is wrong by h^(p + 1), and so is the gradient; the squared loss by its square."""
    losses, slopes = [], []
    for num_points in (41, 81, 161):
        method, flow = distilled(num_points=num_points, solver=solver)
        loss = loss_of(method)
        loss.backward()
        assert flow.slope.grad is not None
        losses.append(loss.item())
        slopes.append(flow.slope.grad.abs().item())
    assert losses[2] < {"euler": 2e-7, "heun": 1e-10}[solver] and losses[0] > 100 * losses[2]
    for values, power in ((losses, 2 * (order + 1)), (slopes, order + 1)):
        for coarse, fine in pairwise(values):
            assert coarse / fine == pytest.approx(2**power, rel=0.4), values


def test_another_function_keeps_a_loss_at_any_number_of_levels() -> None:
    method, flow = distilled(num_points=161)
    truth = loss_of(method).item()
    flow.slope.data.fill_(0.9)
    assert loss_of(method).item() > 1e4 * truth


@pytest.mark.parametrize(("solver", "ratio"), [("euler", 0.38151690), ("heun", 0.49431765)])
def test_one_step_of_the_teacher_has_the_recorded_ratio(solver: str, ratio: float) -> None:
    """Exact is 0.43354235; f*(hi) = 0.31590010 is f*(lo) times that."""
    method, flow = distilled(solver=solver)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    high, low = (torch.full((3,), s, dtype=torch.float64) for s in (1.501742, 0.469979))
    torch.testing.assert_close(method.step(x, x, x, high, low, NONE), ratio * x, rtol=0, atol=3e-8)
    down = (flow(x, high, NONE) / x, 0.43354235 * flow(x, low, NONE) / x)
    for f in down:
        torch.testing.assert_close(f, torch.full_like(f, 0.31590010), rtol=0, atol=1e-8)


class Point(nn.Module):
    """f(x, s) = (s_min/s) x + (1 - s_min/s) theta: right for a point mass at theta."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, weights: Any = None) -> Tensor:
        theta = self.theta if weights is None else weights["theta"]
        share = (0.002 / t).view(-1, 1, 1, 1)
        return (share * x + (1 - share) * theta).to(x.dtype)


def point_mass(num_points: int, index: int, lag: float | None) -> tuple[float, float]:
    """Squared distance and its gradient over the gap for theta - xi = 0.7 and theta - theta^- = lag, None for the
    student as its own target. Theta is 0, where float32 can hold the small differences."""
    method = pixel_ict(distance="l2", weighting="inverse_gap", target="ema" if lag else "student")
    point = Point()
    method.function = point  # type: ignore[assignment]
    if lag is not None:
        method.target = EMA({"theta": point.theta}, 0.9)
        method.target.tensors()["theta"].fill_(-lag)
    sigmas = method.process.grid(num_points)
    chosen = (sigmas[index - 1 : index], sigmas[index : index + 1])
    method.pairs = lambda batch, progress: chosen  # type: ignore[method-assign]
    out = method("student", Batch(Draws(3, 0, [0]), images=torch.full((1, 3, 8, 8), -0.7)), at(0), {})
    out["loss"].backward()
    assert point.theta.grad is not None
    return out["distance"].item(), point.theta.grad.item()


def nearest_to_one(num_points: int) -> int:
    """i of the pair whose sigma_hi is nearest 1."""
    share = torch.arange(num_points, dtype=torch.float64) / (num_points - 1)
    sigmas = (0.002 ** (1 / 7) + share * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    return int((sigmas - 1).abs().argmin())


@pytest.mark.parametrize(
    ("lag", "difference", "slope"), [(None, 8.935391e-4, 1.152184e-3), (0.01, 1.087282e-2, 1.402008e-2)]
)
def test_a_pair_at_a_point_mass_has_the_recorded_difference_and_gradient(
    lag: float | None, difference: float, slope: float
) -> None:
    distance, gradient = point_mass(11, 5, lag)
    assert distance**0.5 == pytest.approx(difference, rel=2e-5)
    assert gradient == pytest.approx(slope, rel=2e-5)


def test_without_an_average_the_gradient_over_the_gap_has_a_limit_and_with_one_it_diverges() -> None:
    """The no-EMA theorem of iCT (arXiv 2310.14189, section 3.2): 2 (1 - s_min/hi) s_min (theta - xi) / hi^2."""
    own = [point_mass(n, nearest_to_one(n), None)[1] for n in (641, 1281)]
    assert own == pytest.approx([2.857630e-3, 2.834878e-3], rel=5e-5)
    assert 2 * (own[1] - 2.812e-3) == pytest.approx(own[0] - 2.812e-3, abs=2e-6)
    averaged = [point_mass(n, nearest_to_one(n), 0.01)[1] for n in (81, 641, 1281)]
    assert averaged == pytest.approx([0.17326, 1.26349, 2.51554], rel=5e-5)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        angle = time.float()[:, None] / 250 * torch.tensor([0.25, 0.5, 1.0, 2.0])
        return (self.layers(torch.cat([x.flatten(1), angle.sin(), angle.cos()], dim=1)).view_as(x),)


class PlainDenoiser(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


class OneGenerator(Draws):
    """All rows from one generator: fast, and not the numbers of a run."""

    def __init__(self, seed: int, rows: int):
        super().__init__(0, 0, [])
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.rows, generator=self.generator)


@pytest.mark.parametrize(
    "settings", [{"s0": 4, "s1": 64}, {"curriculum": "continuous", "huber_c": 0}], ids=["ict", "ect"]
)
def test_one_step_samples_of_a_trained_toy_land_on_both_of_its_modes(settings: dict[str, Any]) -> None:
    """Numbers at -0.5 and 0.5, each with spread 0.05; a network that sees one number and its noise level."""
    method = pixel_ict(sigma_max=5.0, **settings)
    network = Perceptron()
    boundary = partial(edm_boundary, process=method.process)
    method.function = ConsistencyFunction(PlainDenoiser(network, method.process, "edm"), boundary)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 500)
    for k in range(500):
        x0 = (torch.rand(256) < 0.5).float() - 0.5 + 0.05 * torch.randn(256)
        batch = Batch(OneGenerator(k, 256), images=x0.view(-1, 1, 1, 1).expand(-1, 3, -1, -1))
        loss = method("student", batch, at(k, 500), {})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    for times in ([5.0], [5.0, 0.82]):
        samples = Generator(method.function, times)(5 * torch.randn(2000, 1, 1, 1), NONE, torch.randn_like)
        assert ((samples.abs() - 0.5).abs() < 0.2).float().mean() > 0.75, times
        assert 0.35 < (samples > 0).float().mean() < 0.65, times
