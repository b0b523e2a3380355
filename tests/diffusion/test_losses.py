"""Distances of whole samples: recorded values, the slope, and the ends of their range."""

import pytest
import torch
from fewstep.distill.diffusion.losses import mean_distance, pseudo_huber
from torch import Tensor

C = 0.0299298380
RECORDED = {
    0.001: 1.670108e-5, 0.01: 1.626385e-3, 0.03: 1.244699e-2, 0.1: 7.445309e-2, 1.0: 0.970518, 10.0: 9.970115,
}  # fmt: skip


def apart(norm: float, shape: tuple[int, ...] = (1, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    """Two batches whose differences have this norm, at the origin so that float32 can hold it."""
    direction = torch.randn(shape)
    return norm * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1), torch.zeros(shape)


def test_pseudo_huber_has_the_recorded_values() -> None:
    for norm, expected in RECORDED.items():
        assert pseudo_huber(*apart(norm), C).item() == pytest.approx(expected, rel=2e-6), norm


def test_four_entries_of_a_tenth_have_the_recorded_distance() -> None:
    assert pseudo_huber(torch.full((1, 4), 0.1), torch.zeros(1, 4), 0.00108).item() == pytest.approx(
        0.1989229, abs=5e-8
    )


def test_the_norm_is_that_of_the_whole_sample() -> None:
    """A cifar-sized image that is off by 0.01 everywhere: 0.525134, where the mean over pixels would be 0.0016."""
    d = pseudo_huber(torch.full((2, 3, 32, 32), 0.01), torch.zeros(2, 3, 32, 32), C)
    assert d.tolist() == pytest.approx([0.525134] * 2, abs=5e-7)


@pytest.mark.parametrize("norm", [0.001, 0.03, 1.0, 100.0])
def test_the_slope_is_the_difference_over_the_root(norm: float) -> None:
    a, b = apart(norm)
    a.requires_grad_()
    (slope,) = torch.autograd.grad(pseudo_huber(a, b, C).sum(), a)
    expected = norm / (norm**2 + C**2) ** 0.5
    torch.testing.assert_close(slope, expected * a.detach() / norm, rtol=1e-5, atol=1e-7)
    assert slope.norm().item() == pytest.approx({0.001: 0.0333927, 0.03: 0.707932}.get(norm, 1), abs=5e-4)


@pytest.mark.parametrize("size", [1, 64, 256, 784, 1024, 3072, 12288, 16384])
def test_no_difference_is_exactly_no_distance_and_no_gradient(size: int) -> None:
    a = torch.randn(3, size).requires_grad_()
    for c in (0.00054 * size**0.5, 0.0):
        d = pseudo_huber(a, a.detach().clone(), c)
        assert d.tolist() == [0.0] * 3
        (slope,) = torch.autograd.grad(d.sum(), a)
        assert torch.equal(slope, torch.zeros_like(slope))


def test_without_c_it_is_the_norm() -> None:
    assert pseudo_huber(*apart(0.3, (4, 1, 5, 5)), 0.0).tolist() == pytest.approx([0.3] * 4, rel=1e-6)


def test_mean_distances_are_means_over_each_sample() -> None:
    a = torch.tensor([[[1.0, -2.0], [0.0, 0.5]], [[3.0, 0.0], [0.0, 0.0]]])
    b = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert mean_distance("l1", a, b).tolist() == [0.875, 0.5]
    assert mean_distance("l2", a, b).tolist() == [1.3125, 1.0]


def test_half_precision_predictions_are_compared_in_float32() -> None:
    a, b = torch.full((1, 1000), 1.0, dtype=torch.float16), torch.full((1, 1000), 300.0, dtype=torch.float16)
    assert mean_distance("l2", a, b).item() == pytest.approx(299**2)
    assert pseudo_huber(a, b, 0.1).item() == pytest.approx(299 * 1000**0.5 - 0.1, rel=1e-6)
