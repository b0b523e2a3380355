"""Noise consistency against closed forms: couplings, fixed points of linear generators, distances, the multiplier."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from fewstep.distill.methods.control.noise_consistency import (
    Grid,
    Multiplier,
    coupled,
    coupling_sigmas,
    noise_consistency,
    output_distance,
)
from scipy.linalg import hadamard
from torch import Tensor, nn

Pair = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Columns of mean 0, variance 1 and no correlation: expectations of products of two of them are exact.
Z1, Z2, E1, E2, N = torch.tensor(hadamard(8)[:, 1:6], dtype=torch.float64).T


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sigma", "expected"), [(0, (1, -2)), (0.6, (1.1, -1.45)), (0.8, (1.0, -1.0)), (1, (0.5, 0.25))]
)
def test_coupling_by_hand(sigma: float, expected: tuple[float, float]) -> None:
    z, eps = double(1, -2)[None], double(0.5, 0.25)[None]
    torch.testing.assert_close(coupled(z, eps, double(sigma)), double(*expected)[None])


@pytest.mark.parametrize(
    ("s", "t", "correlation"),
    [(0, 0.25, 0.968246), (0.3, 0.5, 0.976136), (0.6, 0.8, 0.96), (0.8, 1, 0.8)],
)
def test_levels_share_one_noise(s: float, t: float, correlation: float) -> None:
    z, eps = torch.stack([Z1, Z2], 1), torch.stack([E1, E2], 1)
    low, high = coupled(z, eps, double(s).expand(8)), coupled(z, eps, double(t).expand(8))
    assert (low * high).mean().item() == pytest.approx(correlation, abs=1e-6)
    assert (high - low).square().mean().item() == pytest.approx(2 - 2 * correlation, abs=2e-6)
    assert high.square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("grid", "levels", "mean"),
    [
        ("trig", 4, 0.923880),
        ("trig", 10, 0.987688),
        ("trig", 20, 0.996917),
        ("linear", 4, 0.907398),
        ("linear", 10, 0.982672),
        ("linear", 20, 0.995217),
    ],
)
def test_mean_correlation_of_neighbouring_levels(grid: Grid, levels: int, mean: float) -> None:
    sigma = coupling_sigmas(levels, grid)
    assert sigma[0] == 0 and sigma[-1] == 1 and len(sigma) == levels + 1
    alpha = (1 - sigma.square()).clamp(min=0).sqrt()
    found = alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]
    assert found.mean().item() == pytest.approx(mean, abs=1e-6)
    if grid == "trig":
        assert found.sub(math.cos(math.pi / 2 / levels)).abs().max() < 1e-12


def wanted(
    theta: Tensor, levels: int, weight: float, grid: Grid = "trig", tau: float = 0.0,
    pair: Pair = noise_consistency,
) -> Tensor:  # fmt: skip
    """The step that training wants of theta = (a, b, p): f = (a z_1 + b c, p z_2), generator z, c = z_1 + tau n."""
    theta = theta.clone().requires_grad_()
    z, eps, c = torch.stack([Z1, Z2], 1), torch.stack([E1, E2], 1), Z1 + tau * N
    sigma = coupling_sigmas(levels, grid)

    def generate(noise: Tensor) -> Tensor:
        return torch.stack([theta[0] * noise[:, 0] + theta[1] * c, theta[2] * noise[:, 1]], 1)

    pairs = [pair(generate, z, eps, low.expand(8), high.expand(8)) for low, high in itertools.pairwise(sigma)]
    consistency = sum(squares(*p) for p in pairs) / levels
    (gradient,) = torch.autograd.grad(consistency + weight * squares(generate(z), z), theta)
    return gradient


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    """The l2 distance in float64."""
    return (prediction - target).square().mean(1).mean()


def linear_map(**options) -> tuple[Tensor, Tensor]:
    """Of a gradient that is affine in theta: its matrix, and the theta where it vanishes."""
    at_zero = wanted(torch.zeros(3).double(), **options)
    matrix = torch.stack([wanted(e, **options) - at_zero for e in torch.eye(3).double()], 1)
    return matrix, torch.linalg.solve(matrix, -at_zero)


@pytest.mark.parametrize(
    ("grid", "levels", "weight", "p"),
    [
        ("trig", 4, 1.0, 0.92926),
        ("trig", 10, 1.0, 0.98784),
        ("linear", 10, 1.0, 0.98297),
        ("trig", 10, 0.1, 0.89038),
    ],
)
def test_a_decisive_control_is_obeyed_and_the_rest_shrinks(
    grid: Grid, levels: int, weight: float, p: float
) -> None:
    _, theta = linear_map(levels=levels, weight=weight, grid=grid)
    assert theta.tolist() == pytest.approx([0, 1, p], abs=6e-6)


def test_without_a_boundary_all_variation_is_lost_and_without_consistency_nothing_is_learnt() -> None:
    gradient = wanted(double(0, 1, 0), levels=10, weight=0.0)
    assert gradient.abs().max() < 1e-12
    assert wanted(double(0, 1, 1), levels=10, weight=0.0)[2] > 1e-3
    boundary = wanted(double(1, 0, 1), levels=10, weight=1.0) - wanted(double(1, 0, 1), levels=10, weight=0.0)
    assert boundary.abs().max() < 1e-12


def two_noises(generate, z, eps, low, high):
    """Wrong: another eps for the second level, independent of the first."""
    with torch.no_grad():
        target = generate(coupled(z, torch.stack([Z1 * Z2 * E1, N], 1), low))
    return generate(coupled(z, eps, high)), target


def no_stop(generate, z, eps, low, high):
    """Wrong: a gradient through both."""
    return generate(coupled(z, eps, high)), generate(coupled(z, eps, low))


@pytest.mark.parametrize(("pair", "p"), [(two_noises, 0.66394), (no_stop, 0.97597)])
def test_wrong_variants_end_elsewhere(pair: Pair, p: float) -> None:
    """So that the fixed points above prove one shared eps and the stop-gradient."""
    _, theta = linear_map(levels=10, weight=1.0, pair=pair)
    assert theta[2].item() == pytest.approx(p, abs=6e-6)


def test_the_target_is_the_more_coupled_level() -> None:
    z, eps, low, high = double(1, -2)[None], double(0.5, 0.25)[None], double(0.6), double(0.8)
    scale = double(1.0).requires_grad_()
    noisier, target = noise_consistency(lambda noise: scale * noise, z, eps, low, high)
    torch.testing.assert_close(target, double(1.1, -1.45)[None])
    torch.testing.assert_close(noisier.detach(), double(1.0, -1.0)[None])
    assert noisier.requires_grad and not target.requires_grad


@pytest.mark.parametrize(("levels", "pair", "rate"), [(10, noise_consistency, 0.0562), (10, no_stop, 0.0123)])
def test_the_stop_gradient_makes_control_come_sooner(levels: int, pair: Pair, rate: float) -> None:
    matrix, _ = linear_map(levels=levels, weight=1.0, pair=pair)
    slow = torch.linalg.eigvals(matrix[:2, :2]).real.min().item()
    assert slow == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("weight", "a", "b"), [(1.0, 0.42006, 0.54796), (10.0, 0.87869, 0.11462)])
def test_a_random_control_is_obeyed_less_the_more_the_boundary_weighs(
    weight: float, a: float, b: float
) -> None:
    _, theta = linear_map(levels=4, weight=weight, tau=0.5)
    assert theta[:2].tolist() == pytest.approx([a, b], abs=6e-6)


def test_distances_by_hand() -> None:
    d = double(0.1, -0.2, 0.3)[None]
    assert output_distance("l2", d, 0 * d, 0.03).item() == pytest.approx(0.14 / 3, rel=1e-6)
    assert output_distance("huber", d, 0 * d, 0.03).item() == pytest.approx(0.3453665, abs=1e-7)
    pair = torch.cat([d, 0 * d])
    assert output_distance("huber", pair, 0 * pair, 0.03).item() == pytest.approx(0.3453665 / 2, abs=1e-7)


def test_the_multiplier_by_hand() -> None:
    multiplier = Multiplier(1.0, rate=10.0, margin=0.01)
    seen = []
    for bound in (0.05, 0.03, 0.005, 0.0):
        multiplier.update(torch.tensor(bound))
        seen.append(multiplier.value.item())
    assert seen == pytest.approx([1.4, 1.6, 1.55, 1.45])
    for _ in range(40):
        multiplier.update(torch.tensor(0.0))
    assert multiplier.value.item() == 0
    multiplier.update(torch.tensor(0.03))
    assert multiplier.value.item() == pytest.approx(0.2)
    assert list(multiplier.state_dict()) == ["value"]


class Added(nn.Module):
    """A frozen generator of two numbers, x_1 = tanh z_1 + 0.3 z_2, x_2 = z_2 - 0.3 sin 2 z_1, and an MLP of (z, c)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 96, 96, 2)
        linear = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
        nn.init.zeros_(linear[-1].weight)
        nn.init.zeros_(linear[-1].bias)
        self.mlp = nn.Sequential(linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])

    @staticmethod
    def frozen(z: Tensor) -> Tensor:
        z1, z2 = z.unbind(1)
        return torch.stack([z1.tanh() + 0.3 * z2, z2 - 0.3 * (2 * z1).sin()], 1)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.frozen(z) + self.mlp(torch.cat([z, c[:, None]], 1))


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "margin", "weight_end"), [(0.0, 0.0, 1.0), (2.0, 1e-3, 0.69)])
def test_a_control_is_learnt_and_diversity_kept(rate: float, margin: float, weight_end: float) -> None:
    """Thresholds that no wrong variant of the specification meets: two noises 0.58, no stop-gradient 0.76 of spread."""
    torch.manual_seed(0)
    net, multiplier = Added(), Multiplier(1.0, rate, margin)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95))
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    sigma = coupling_sigmas(10).float()
    for _ in range(4000):
        z, eps = torch.randn(2, 512, 2)
        x = net.frozen(z)
        c, k = x[:, 0], torch.randint(0, 10, (512,))
        pair = noise_consistency(lambda noise, c=c: net(noise, c), z, eps, sigma[k], sigma[k + 1])
        consistency = 2 * output_distance("l2", *pair, huber_c=1.0)
        boundary = 2 * output_distance("l2", net(z, c), x, huber_c=1.0)
        optimiser.zero_grad()
        (consistency + multiplier.value.float() * boundary).backward()
        optimiser.step()
        multiplier.update(boundary.detach())
        average.update_parameters(net)
    with torch.no_grad():
        c = net.frozen(torch.randn(20000, 2))[:, 0]
        made = average(torch.randn(20000, 2), c)
    assert (made[:, 0] - c).abs().mean() < 0.05
    assert made[:, 1].std() > 0.9
    assert multiplier.value.item() == pytest.approx(weight_end, abs=0.25)
