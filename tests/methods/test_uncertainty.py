"""Ctrl-U's weighting at recorded values, its gradients, its stationary point and its limits."""

import math

import pytest
import torch
from fewstep.distill.methods.latent_consistency.uncertainty import kl_uncertainty, uncertainty_weighted
from torch import Tensor

PRIMARY, AUXILIARY = torch.tensor([[2.0, 0, -1]]).double(), torch.tensor([[1.0, 1, -1]]).double()
DEPTHS = [torch.tensor([row]).double() for row in ((0.2, 0.5, 0.9), (0.25, 0.5, 0.6), (0.3, 0.4, 0.8))]


def cross_entropy(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.zeros(1, dtype=torch.long), reduction="none")


@pytest.mark.parametrize(
    ("u_scale", "uncertainty", "weight", "reward", "total"),
    [(1.0, 0.411222, 0.662840, 0.112581, 0.422480), (0.1, 0.041122, 0.959712, 0.163004, 0.057423)],
)
def test_one_pixel_of_a_segmentation(
    u_scale: float, uncertainty: float, weight: float, reward: float, total: float
) -> None:
    """The scale is inside U: both the weight and the penalty have it."""
    assert cross_entropy(PRIMARY).item() == pytest.approx(0.169846, abs=1e-6)
    u = u_scale * kl_uncertainty(PRIMARY, AUXILIARY)
    rectified, mean = uncertainty_weighted(cross_entropy(PRIMARY), u)
    assert u.item() == mean.item() == pytest.approx(uncertainty, abs=1e-6)
    assert (-u).exp().item() == pytest.approx(weight, abs=1e-6)
    assert rectified.item() == pytest.approx(reward, abs=1e-6)
    assert (0.1 * rectified + mean).item() == pytest.approx(total, abs=1e-6)


def test_both_branches_have_gradients() -> None:
    primary, auxiliary = (y.clone().requires_grad_() for y in (PRIMARY, AUXILIARY))
    rectified, mean = uncertainty_weighted(cross_entropy(primary), kl_uncertainty(primary, auxiliary))
    (0.1 * rectified + mean).backward()
    expected = {0.360903: 0, -0.342559: 1, -0.018344: 2}
    assert primary.grad is not None and auxiliary.grad is not None
    assert primary.grad[0].tolist() == pytest.approx(list(expected), abs=1e-6)
    assert auxiliary.grad[0].tolist() == pytest.approx([-0.463038, 0.463038, 0], abs=1e-6)


def test_the_direction_of_the_divergence_and_its_precision() -> None:
    assert kl_uncertainty(AUXILIARY, PRIMARY).item() == pytest.approx(0.318377, abs=1e-6)
    half = kl_uncertainty(PRIMARY.half(), AUXILIARY.half())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(0.411222, abs=1e-5)
    maps = torch.randn(2, 2, 5, 4, 4).double()
    summed = torch.nn.functional.kl_div(maps[0].log_softmax(1), maps[1].softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(kl_uncertainty(maps[0], maps[1]), summed)


def test_a_row_of_depths() -> None:
    y1, y2, label = DEPTHS
    u = (y1 - y2).abs()
    rectified, mean = uncertainty_weighted((y1 - label).square(), u)
    assert u[0].tolist() == pytest.approx([0.05, 0, 0.3])
    assert (y1 - label).square().mean().item() == pytest.approx(0.01)
    assert rectified.item() == pytest.approx(0.00897349, abs=1e-8)
    assert (rectified + 0.1 * mean).item() == pytest.approx(0.02064016, abs=1e-8)


def test_agreeing_views_leave_the_plain_mean_and_disagreement_never_raises_a_weight() -> None:
    cost = torch.rand(6).double()
    rectified, mean = uncertainty_weighted(cost, torch.zeros(6).double())
    assert torch.equal(rectified, cost.mean()) and mean == 0
    falling = [uncertainty_weighted(cost, torch.full((6,), u).double())[0].item() for u in (0.1, 0.5, 2)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("cost", "penalty", "expected"),
    [(2.0, 1.0, 0.693147), (0.5, 0.1, 1.609438), (0.5, 0.5, 0.0), (0.1, 1.0, 0.0)],
)
def test_the_stationary_uncertainty_is_the_logarithm_of_cost_over_penalty(
    cost: float, penalty: float, expected: float
) -> None:
    u = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        rectified, mean = uncertainty_weighted(torch.tensor(cost).double(), u)
        (slope,) = torch.autograd.grad(rectified + penalty * mean, u)
        with torch.no_grad():
            u.sub_(0.05 * slope / penalty).clamp_(min=0)
    assert u.item() == pytest.approx(max(0, math.log(cost / penalty)), abs=1e-4)
    assert u.item() == pytest.approx(expected, abs=1e-4)


def test_a_detached_weight_has_the_same_value_and_another_gradient() -> None:
    u = torch.tensor([0.3, 0.7], requires_grad=True)
    cost = torch.tensor([1.0, 2.0], requires_grad=True)
    plain, cut = (uncertainty_weighted(cost, u, detach=d)[0] for d in (False, True))
    assert torch.equal(plain, cut)
    slopes = torch.autograd.grad(plain, (cost, u))
    torch.testing.assert_close(slopes[1], -cost * (-u).exp() / 2)
    by_cost, by_u = torch.autograd.grad(cut, (cost, u), allow_unused=True)
    assert torch.equal(by_cost, slopes[0]) and by_u is None


def test_only_samples_inside_the_gate_count() -> None:
    cost, u = torch.rand(4, 3).double(), torch.rand(4, 3).double()
    mask = torch.tensor([True, False, True, False])
    gated, inside = uncertainty_weighted(cost, u, mask=mask), uncertainty_weighted(cost[mask], u[mask])
    for a, b in zip(gated, inside, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-9)
    empty = uncertainty_weighted(cost[:, 0], u[:, 0], mask=torch.zeros(4, dtype=torch.bool))
    assert empty[0] == 0 and empty[1] == 0
