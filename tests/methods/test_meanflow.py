"""The MeanFlow loss against values of the official PyTorch loss on an analytic network, and what changes them."""

from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.derivative import total_derivative
from fewstep.distill.diffusion.losses import adaptive, unit_step
from fewstep.distill.diffusion.process import RectifiedFlow
from fewstep.distill.methods.meanflow.meanflow import MeanFlow
from meanflow_reference import EPS, X0, Analytic, Known, R, T, meanflow_on, run
from torch import Tensor, nn

Z = torch.tensor([[-0.6, 0.3], [1.3, 0.8]], dtype=torch.float64)
V = torch.tensor([[-2.0, 1.0], [1.75, -2.0]], dtype=torch.float64)
TARGET = torch.tensor([[-2.05, 0.785], [1.75, -2.0]], dtype=torch.float64)
U0 = torch.tensor([[-0.02, 0.187]], dtype=torch.float64)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b.to(a), rtol=0, atol=atol)


def loss_and_gradient(**settings: Any) -> tuple[Tensor, Tensor]:
    method = meanflow_on(Analytic(), (R, T), **settings)
    loss = run(method, X0, Known(EPS))["loss"]
    (gradient,) = torch.autograd.grad(loss, [p for p in method.student.network.parameters()])
    return loss, gradient


@pytest.mark.parametrize(
    ("p", "c", "loss", "gradient"),
    [
        (1.0, 0.01, 0.9981452612, (-0.2607332709, -0.2187056974, 0.1595186280, 0.0791102131)),
        (0.75, 1e-3, 1.5327725778, (-0.372202353, -0.3140884759, 0.2325362025, 0.1041551727)),
        (0.5, 1e-3, 2.3559487960, None),
        (0.0, 1e-3, 5.6090645, (-1.0559, -0.91302, 0.716, 0.19293)),
    ],
)
@pytest.mark.parametrize("derivative", ["kernel", "math", "double_backward"])
def test_loss_and_gradient_are_those_of_the_official_code(
    derivative: str, p: float, c: float, loss: float, gradient: tuple[float, ...] | None
) -> None:
    ours, slope = loss_and_gradient(norm_p=p, norm_c=c, derivative=derivative)
    assert ours.item() == pytest.approx(loss, rel=1e-9)
    if gradient is not None:
        close(slope, double(*gradient))


def parts_of(method: MeanFlow) -> dict[str, Tensor]:
    """What the forward hands to its derivative, and that derivative."""
    seen: dict[str, Tensor] = {}
    rate = method.rate

    def spy(z: Tensor, r: Tensor, t: Tensor, tangent: Tensor, told: Condition) -> Tensor:
        seen.update(z=z, tangent=tangent, rate=rate(z, r, t, tangent, told))
        return seen["rate"]

    method.rate = spy  # type: ignore[method-assign]
    seen["error"] = run(method, X0, Known(EPS))["error"]
    return seen


def test_the_steps_of_the_calculation() -> None:
    """du/dt of the second sample is not needed: r = t there."""
    method = meanflow_on(Analytic(), (R, T))
    seen = parts_of(method)
    close(seen["z"], Z)
    close(seen["tangent"], V)
    close(seen["rate"], torch.stack([double(0.1, 0.43), double(0, 0)]))
    close(seen["error"], double(4.478504, 6.739625).mean() / 2)
    method.drops = True  # with dropout every row is passed, so that its masks are those of the graded pass
    close(parts_of(method)["rate"], torch.stack([double(0.1, 0.43), double(0.825, -1.0)]))


def test_a_row_keeps_its_derivative_wherever_it_stands() -> None:
    method = meanflow_on(Analytic())
    flipped = method.rate(Z.flip(0), R.flip(0), T.flip(0), V.flip(0), Condition({}, {}))
    close(flipped, torch.stack([double(0, 0), double(0.1, 0.43)]))


def test_the_tangent_runs_along_v_0_1() -> None:
    """The values of wrong directions, so that none of them can pass as ours."""
    network = Analytic()

    network.requires_grad_(False)

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return network(z, t, t - r)[0]

    def along(velocity: Tensor, dr: float, dt: float) -> Tensor:
        one = torch.ones_like(T)
        return torch.func.jvp(u, (Z, R, T), (velocity, dr * one, dt * one))[1][0]

    close(along(V, 0, 1), double(0.1, 0.43))
    close(along(V, 1, 0), double(-0.48, 0.12))
    close(along(V, 0, 0), double(-0.28, 0.32))
    close(along(V, 1, 1), double(-0.10, 0.23))
    close(along(-V, 0, 1), double(0.66, -0.21))
    for by in ("kernel", "math", "double_backward"):
        close(total_derivative(u, Z, R, T, V, by=by)[0], double(0.1, 0.43))


def test_improved_meanflow_takes_the_students_own_velocity_as_tangent() -> None:
    """Its loss |u + (t - r) sg(du/dt) - v|^2 has the gradient of MeanFlow's with that tangent."""
    method = meanflow_on(Analytic(), (R, T), norm_p=0, tangent="student")
    close(parts_of(method)["tangent"], torch.stack([double(-0.12, 0.087), double(0.585, 0.32)]))
    _, gradient = loss_and_gradient(norm_p=0, tangent="student")
    close(2 * gradient, double(-2.357368, -2.0224944, 1.4175200, 0.4543176))
    _, gradient = loss_and_gradient(norm_p=0)
    close(2 * gradient, double(-2.1118, -1.82604, 1.432, 0.38586))


def test_adaptive_weighting_has_no_gradient_through_its_weight() -> None:
    squares = double(4.478504, 6.739625).requires_grad_()
    (slope,) = torch.autograd.grad(adaptive(squares, 0.75, 1e-3).sum(), squares)
    close(slope, (squares.detach() + 1e-3) ** -0.75)


@pytest.mark.parametrize(
    ("c", "per_element", "losses"),
    [(0.1, False, (0.9117933, 0.9271939)), (10.0, True, (0.0169425, 0.0240557))],
)
def test_fastgens_gradient_loss(c: float, per_element: bool, losses: tuple[float, float]) -> None:
    u = torch.cat([U0, double(0.585, 0.32)[None]]).requires_grad_()
    loss = unit_step(u, TARGET - u, 1.0, c, per_element)
    close(loss, double(*losses), atol=1e-6)
    (slope,) = torch.autograd.grad(loss.sum(), u)
    if not per_element:
        close(slope[0], double(1.8319253, -0.5396509), atol=1e-6)
    settings: dict[str, Any] = {"loss": "opt_grad", "norm_c": c, "per_element": per_element}
    ours, gradient = loss_and_gradient(**settings)
    assert ours.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    network = Analytic()
    (chained,) = torch.autograd.grad((network(Z, T, T - R)[0] * slope).sum() / 2, network.abcd)
    close(gradient, chained)


def test_the_derivative_grows_in_over_the_warm_up() -> None:
    method = meanflow_on(Analytic(), (R, T), norm_p=0, tangent_warmup=4)
    for iteration, weight in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        loss = run(method, X0, Known(EPS), at=iteration)["loss"]
        target = V - weight * torch.stack([double(0.05, 0.215), double(0, 0)])
        u = torch.cat([U0, double(0.585, 0.32)[None]])
        assert loss.item() == pytest.approx((u - target).square().sum(1).mean().item(), rel=1e-9)


class Labelled(nn.Module):
    """u = the label, whatever z, t and h."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.free = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, h: Tensor, value: Tensor) -> tuple[Tensor]:
        self.seen.append(torch.stack([value[:, 0], h], dim=1))
        return (0 * z + value.view(-1, *[1] * (z.ndim - 1)) + self.free,)


def velocity_of(omega: float, kappa: float, **more: Any) -> Tensor:
    """Guided velocity of four samples at t = 0.2, 0.4, 0.6, 0.8: v = 2, v_c = 1.5, v_u = 0.5; the last is dropped."""
    t = double(0.2, 0.4, 0.6, 0.8)
    method = meanflow_on(Labelled(), (0.5 * t, t), omega=omega, kappa=kappa, condition_dropout=0.1, **more)
    condition = Condition({"value": torch.full((4, 1), 1.5).double()}, {"value": double(0.5)[None]})
    x0, eps = torch.zeros(4, 1).double(), torch.full((4, 1), 2.0).double()
    draws = Known(eps, [double(0.5, 0.1, 0.3, 0.09)])
    batch = type("Batch", (), {"draws": draws, "condition": condition})
    velocity, tangent, told = method.velocities(x0, eps, x0, t, batch)
    assert torch.equal(velocity, tangent)
    close(told.arguments["value"][:, 0], double(1.5, 1.5, 1.5, 0.5))
    return velocity[:, 0]


@pytest.mark.parametrize(("omega", "kappa", "value"), [(2, 0, 3.5), (1, 0.5, 2.5), (0.2, 0.92, 1.72)])
def test_guidance_in_the_target(omega: float, kappa: float, value: float) -> None:
    """Samples without their label have the plain velocity."""
    close(velocity_of(omega, kappa), double(value, value, value, 2))
    close(velocity_of(omega, kappa, guidance_start=0.3, guidance_end=0.6), double(2, value, value, 2))


def test_no_gradient_flows_through_the_guided_velocity() -> None:
    """u = 1.5 is pulled to 2 v - 1.5 u(null) + 0.5 u(label) of the same network; only the first u has a gradient."""
    network = Labelled()
    method = meanflow_on(network, (T, T), omega=2.0, kappa=0.5, norm_p=0.0)
    condition = Condition({"value": torch.full((2, 1), 1.5).double()}, {"value": double(0.5)[None]})
    loss = run(method, X0, Known(EPS, [double(0.5, 0.5)]), condition)["loss"]
    target = 2 * V - 1.5 * 0.5 + 0.5 * 1.5
    (slope,) = torch.autograd.grad(loss, network.free)
    assert slope.item() == pytest.approx((2 * (1.5 - target)).sum().item() / 2)


@pytest.mark.parametrize(("omega", "kappa", "fixed"), [(2, 0, 3.5), (1, 0.5, 3.5), (0.2, 0.92, 4.25)])
def test_the_guided_velocity_repeats_itself_at_the_effective_scale(
    omega: float, kappa: float, fixed: float
) -> None:
    v, v_u = 2.0, 0.5
    assert v_u + omega / (1 - kappa) * (v - v_u) == pytest.approx(fixed)
    assert omega * v + (1 - omega - kappa) * v_u + kappa * fixed == pytest.approx(fixed)


def test_the_null_label_is_trained_at_r_below_t_and_both_passes_see_it() -> None:
    t = double(0.5, 0.8)
    network = Labelled()
    method = meanflow_on(network, (double(0.2, 0.8), t), condition_dropout=0.1)
    condition = Condition({"value": torch.full((2, 1), 1.5).double()}, {"value": double(0.5)[None]})
    run(method, X0, Known(EPS, [double(0.05, 0.05)]), condition)
    derivative, graded = network.seen
    close(derivative, torch.tensor([[0.5, 0.3]]), atol=1e-7)
    close(graded, torch.tensor([[0.5, 0.3], [0.5, 0.0]]), atol=1e-7)


def test_the_process_is_a_straight_path() -> None:
    close(RectifiedFlow().noised(X0, EPS, T), Z)
