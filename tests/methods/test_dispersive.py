"""Dispersive regularisers: recorded values, range, scale, and a loss that drives rows apart."""

import math

import pytest
import torch
from fewstep.distill.methods.meanflow.dispersive import dispersive

ROWS = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "tau", "value"),
    [("infonce_l2", 1.0, -0.8434625864), ("infonce_l2", 0.5, -1.0105102062), ("mp1", 1.0, -0.3665499618)],
)
def test_recorded_values(kind: str, tau: float, value: float) -> None:
    assert dispersive(kind, ROWS, tau).item() == pytest.approx(value, abs=2e-6)  # type: ignore[arg-type]
    assert dispersive(kind, ROWS.view(3, 2, 2) + 7, tau).item() == pytest.approx(value, abs=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["infonce_l2", "mp1"])
def test_equal_rows_give_zero_and_far_ones_no_less_than_log_of_their_share(kind: str) -> None:
    assert dispersive(kind, torch.full((5, 9), 3.7)).item() == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    far = dispersive("infonce_l2", 1e3 * torch.eye(5))
    assert far.item() == pytest.approx(math.log(1 / 5), abs=1e-6)


def test_only_mp1_is_blind_to_the_scale() -> None:
    assert dispersive("mp1", 10 * ROWS).item() == pytest.approx(dispersive("mp1", ROWS).item(), abs=1e-6)
    assert dispersive("infonce_l2", 10 * ROWS) < dispersive("infonce_l2", ROWS) - 0.2


@pytest.mark.parametrize("kind", ["infonce_l2", "mp1"])
def test_the_gradient_is_that_of_pairwise_distances(kind: str) -> None:
    """Through the largest distance too."""
    h = torch.randn(6, 5, dtype=torch.float64).float().requires_grad_()
    (ours,) = torch.autograd.grad(dispersive(kind, h), h)  # type: ignore[arg-type]
    d = (h[:, None] - h).square().sum(-1)
    d = d / 5 if kind == "infonce_l2" else d / d.max()
    (plain,) = torch.autograd.grad((-d).exp().mean().log(), h)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
