"""KID: the worked example, a plain double loop, and no bias."""

import pytest
import torch
from fewstep.distill.metrics.kid import kid, kid_over
from torch import Tensor

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
Y = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])


def kid_by_loops(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def within(z: Tensor) -> float:
        pairs = [k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_reference_value() -> None:
    assert kid(X, Y) == pytest.approx(-2.5833333333333333, abs=1e-12)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_agrees_with_loops_for_any_block_and_sizes(block: int) -> None:
    x, y = torch.randn(7, 5).double(), torch.randn(4, 5).double() + 1
    assert kid(x, y, block=block) == pytest.approx(kid_by_loops(x, y), rel=1e-12)
    assert kid(y, x, block=block) == pytest.approx(kid_by_loops(x, y), rel=1e-12)


def test_mean_and_sd_over_parts() -> None:
    x, y = torch.randn(20, 6), torch.randn(30, 6)
    blocks = y.split(10)
    values = torch.tensor([kid(x, b) for b in blocks], dtype=torch.float64)
    assert kid_over(x, blocks) == pytest.approx((values.mean().item(), values.std().item()), rel=1e-12)
    assert kid_over(x, [y]) == (pytest.approx(kid(x, y)), None)


@pytest.mark.slow
def test_equal_distributions_have_mean_zero_at_any_size() -> None:
    for n in (5, 50):
        values = torch.tensor([kid(torch.randn(n, 8), torch.randn(40, 8)) for _ in range(400)])
        assert abs(values.mean()) < 3 * values.std() / 20


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kid(X[:1], Y)
    with pytest.raises(ValueError, match="not finite"):
        kid(X, Y / 0)
    with pytest.raises(ValueError, match="2 and of 3"):
        kid(X, torch.ones(4, 3))


def test_agrees_with_torchmetrics_and_torch_fidelity_on_one_whole_subset() -> None:
    """Both take the mean over subsets of equal size: one subset of all rows is the value of whole sets."""
    x, y = torch.randn(60, 8), torch.randn(60, 8) * 1.2 + 0.3
    ours = kid(x, y)
    from torch_fidelity import metric_kid

    theirs = metric_kid.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=2, kid_subset_size=60, verbose=False, rng_seed=0
    )
    assert theirs["kernel_inception_distance_mean"] == pytest.approx(ours, rel=1e-6)

    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(torch.nn.Module):
        num_features = 8

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    metric = KernelInceptionDistance(feature=Given(), subsets=2, subset_size=60)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert float(metric.compute()[0]) == pytest.approx(ours, rel=1e-4)  # float32 kernels
