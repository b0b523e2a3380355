"""α-Flow's and SplitMeanFlow's targets: recorded values, exact fields, limits, and MeanFlow trained on them."""

import math
from typing import Any

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.methods.meanflow.meanflow import check
from fewstep.distill.methods.meanflow.settings import MeanFlowSettings
from fewstep.distill.methods.meanflow.targets import alpha_target, annealed_alpha, split_target
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from meanflow_reference import EPS, X0, Analytic, Gaussian, Known, R, T, meanflow_on, run
from torch import Tensor, nn

Z = torch.tensor([[-0.6, 0.3], [1.3, 0.8]], dtype=torch.float64)
V = torch.tensor([[-2.0, 1.0], [1.75, -2.0]], dtype=torch.float64)
ALPHA_TARGET, SPLIT_TARGET = (-0.51265625, 0.34759375), (-0.08766464, 0.1440475096)


def analytic(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return Analytic().requires_grad_(False)(z, t, t - r)[0]


def close(a: Tensor, b: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=atol)


def test_recorded_values() -> None:
    first = Z[:1], R[:1], T[:1]
    close(alpha_target(analytic, *first, V[:1], V[:1], 0.25)[0], ALPHA_TARGET)
    close(split_target(analytic, *first, torch.tensor([0.4], dtype=torch.float64))[0], SPLIT_TARGET)


def test_the_exact_mean_velocity_of_gaussian_data_is_its_own_target() -> None:
    """Splitting holds for every share, α-Flow's target only in its limits: the path is straight over the first part."""
    field = Gaussian(0.5, 0.5)
    z, r, t = (torch.tensor(a, dtype=torch.float64) for a in ((1.2, -0.4), (0.3, 0.1), (0.8, 0.9)))

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return field.mean_velocity(z, t, r)

    exact, v = u(z, r, t), field.velocity(z, t)
    for share in (0.1, 0.4, 0.9):
        close(split_target(u, z, r, t, torch.full_like(t, share)), exact, atol=1e-14)
    for alpha in (1e-3, 1e-4):
        close(alpha_target(u, z, r, t, v, v, alpha), exact, atol=2 * alpha**2)

    def never(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    assert torch.equal(alpha_target(never, z, r, t, v, v, 1.0), v)


def test_a_small_alpha_gives_alpha_times_meanflows_difference() -> None:
    """With the derivative along the tangent of that call."""
    rate = torch.tensor([[0.1, 0.43]], dtype=torch.float64)
    first, alpha = (Z[:1], R[:1], T[:1]), 1e-6
    u = analytic(*first)
    difference = (alpha_target(analytic, *first, V[:1], V[:1], alpha) - u) / alpha
    close(difference, V[:1] - 0.5 * rate - u, atol=1e-5)
    backwards = (alpha_target(analytic, *first, V[:1], -V[:1], alpha) - u) / alpha
    close(backwards, V[:1] - 0.5 * torch.tensor([[0.66, -0.21]], dtype=torch.float64) - u, atol=1e-5)


def test_the_anneal_falls_as_a_sigmoid_between_its_ends() -> None:
    def at(done: float) -> float:
        return annealed_alpha(done, 0.2, 0.6, 25.0, 0.005)

    assert [at(d) for d in (0.0, 0.19, 0.2, 0.6, 0.9)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert at(0.4) == pytest.approx(0.5)
    assert at(0.44) == pytest.approx(1 / (1 + math.exp(2.5)))
    assert at(0.36) == pytest.approx(1 - at(0.44))
    assert at(0.49) == 0.0 and at(0.48) == pytest.approx(1 / (1 + math.exp(5)))  # 0.0036 and 0.0067
    assert at(0.31) == 1.0 and at(0.32) < 1


def run_at(iteration: int, uniforms: list[Tensor] | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    method = meanflow_on(Analytic(), (R, T), norm_p=0, **settings)
    loss = run(method, X0, Known(EPS, uniforms), at=iteration)["loss"]
    (slope,) = torch.autograd.grad(loss, list(method.student.network.parameters()))
    return loss, slope


def expected(target: tuple[float, float], weight: float) -> tuple[Tensor, Tensor]:
    """The mean over the two rows, of which the second has r = t and the velocity as target."""
    network = Analytic()
    u = network(Z, T, T - R)[0]
    pulled_to = torch.stack([torch.tensor(target, dtype=torch.float64), V[1]])
    weights = torch.tensor([weight, 1.0], dtype=torch.float64)
    loss = (weights * (u - pulled_to).square().sum(1)).mean()
    return loss, torch.autograd.grad(loss, network.abcd)[0]


def test_meanflow_trains_on_them() -> None:
    """α at the middle of the anneal with another steepness; the network is evaluated without a gradient."""
    gamma = -math.log(3) / -0.1  # alpha = 1/4 at 6 of 10 steps
    for ours, theirs in (
        (run_at(6, target="alpha_flow", alpha_gamma=gamma), expected(ALPHA_TARGET, 0.25)),
        (run_at(0, target="alpha_flow"), expected((-2.0, 1.0), 1.0)),
        (run_at(9, target="alpha_flow", alpha_end=0.8), run_at(9)),
        (
            run_at(0, [torch.tensor([0.4, 0.7])], target="split"),
            expected(SPLIT_TARGET, 1.0),
        ),
        (
            run_at(6, target="alpha_flow", alpha_gamma=gamma, target_clip=0.4),
            expected((-0.4, ALPHA_TARGET[1]), 0.25),
        ),
    ):
        close(ours[0], theirs[0].item(), atol=1e-7)
        close(ours[1], theirs[1], atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "uniforms"),
    [({"target": "split"}, [torch.tensor([0.4, 0.7])]), ({"target": "alpha_flow"}, None)],
)
def test_with_dropout_rows_without_a_span_keep_the_velocity(
    settings: dict[str, Any], uniforms: list[Tensor] | None
) -> None:
    method = meanflow_on(Analytic(), (R, T), norm_p=0, **settings)
    left_out = run(method, X0, Known(EPS, uniforms and list(uniforms)), at=5)["loss"]
    method.drops = True  # then those rows are evaluated too
    assert torch.equal(run(method, X0, Known(EPS, uniforms), at=5)["loss"], left_out)


def test_the_weight_of_alpha_holds_for_either_loss() -> None:
    """opt_grad at p = 0 is the square of the wanted step."""
    settings: dict[str, Any] = {"target": "alpha_flow", "alpha_gamma": 11.0, "norm_p": 0}
    method = meanflow_on(Analytic(), (R, T), **settings)
    other = meanflow_on(Analytic(), (R, T), loss="opt_grad", **settings)
    squares, steps = (run(m, X0, Known(EPS), at=6)["loss"] for m in (method, other))
    close(steps, squares.item(), atol=1e-12)


def test_the_mean_of_squares_instead_of_their_sum() -> None:
    """Two elements a sample: D / (D + c) of the mean is that of the sum with 2 c."""
    method = meanflow_on(Analytic(), (R, T), per_element=True, norm_c=0.01)
    mean = run(method, X0, Known(EPS))["loss"]
    method = meanflow_on(Analytic(), (R, T), norm_c=0.02)
    close(mean, run(method, X0, Known(EPS))["loss"].item(), atol=1e-12)


class Dropping(nn.Module):
    """u = z with half of the elements dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor]:
        self.calls.append(self.drop(torch.ones_like(z)))
        return (self.scale * self.calls[-1] * z,)


@pytest.mark.parametrize("target", ["split", "alpha_flow"])
def test_every_evaluation_drops_what_the_graded_pass_drops(target: str) -> None:
    network = Dropping().train()
    method = meanflow_on(network, (R, T), target=target)
    method.drops = True
    run(method, X0.repeat(1, 8), Known(EPS.repeat(1, 8), [torch.tensor([0.4, 0.7])]), at=5)
    first, *others = network.calls
    assert len(others) == (2 if target == "split" else 1)
    assert 0 < (first == 0).sum() < first.numel()
    assert all(torch.equal(first, mask) for mask in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "split", "tangent": "student"}, "method.tangent: has no effect on target split"),
        ({"target": "split", "tangent_warmup": 10}, "method.tangent_warmup: has no effect on target split"),
        ({"target_clip": 4.0}, "method.target_clip: has no effect on target derivative"),
        (
            {"target": "alpha_flow", "alpha_start": 0.5, "alpha_end": 0.5},
            "method.alpha_start: 0.5 is not below alpha_end 0.5",
        ),
        ({"target": "split", "derivative": "math"}, "method.derivative: has no effect on target split"),
        ({"alpha_gamma": 9.0}, "method.alpha_gamma: has no effect on target derivative"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(MeanFlowSettings(**settings), Parts(None, StudentSettings(init="scratch"), []))
