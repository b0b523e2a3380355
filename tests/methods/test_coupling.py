"""Optimal pairing of samples and noise: a recorded case, all permutations, invariants, groups."""

from itertools import permutations

import pytest
import torch
from fewstep.distill.methods.consistency_training.coupling import optimal_pairing
from scipy.stats import kstest
from torch import Tensor

X0 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
EPS = torch.tensor([[0.0, 1.8], [0.2, 0.1], [1.5, -0.2]])


def total(x0: Tensor, eps: Tensor, pairing: Tensor) -> float:
    return float((x0 - eps[pairing]).double().square().sum())


def test_recorded_case() -> None:
    cost = (X0[:, None] - EPS).square().sum(2)
    expected = torch.tensor([[3.24, 0.05, 2.29], [4.24, 0.65, 0.29], [0.04, 3.65, 7.09]])
    torch.testing.assert_close(cost, expected, rtol=0, atol=1e-6)
    assert optimal_pairing(X0, EPS).tolist() == [1, 2, 0]
    assert total(X0, EPS, torch.tensor([1, 2, 0])) == pytest.approx(0.38, abs=1e-6)
    assert total(X0, EPS, torch.arange(3)) == pytest.approx(10.98, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_permutation_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 6, 2, 3, 3, generator=generator)
    best = min(total(x0, eps, torch.tensor(p)) for p in permutations(range(6)))
    pairing = optimal_pairing(x0, eps)
    assert total(x0, eps, pairing) == pytest.approx(best, rel=1e-12)
    assert total(x0, eps, pairing) < total(x0, eps, torch.arange(6))


def test_every_noise_is_used_once_and_stays_gaussian() -> None:
    """Drawing pairs from the plan with replacement would drop some; the noise as a set is what was drawn."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = 0.5 * torch.randn(128, 4, 4, generator=generator), torch.randn(128, 4, 4, generator=generator)
    pairing = optimal_pairing(x0, eps)
    assert pairing.sort().values.tolist() == list(range(128)) and pairing.tolist() != list(range(128))
    assert kstest(eps[pairing].flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(optimal_pairing(x0, eps), pairing)
    paired, drawn = ((x0 - e).square().mean() for e in (eps[pairing], eps))
    assert paired < 0.9 * drawn
    assert torch.equal(optimal_pairing(x0 / 37, eps), pairing)  # the scale of the cost does not matter


def test_groups_exchange_noise_within_themselves_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 12, 5, generator=generator)
    groups = ["a", "b", "c", "a", "b", "a", "d", "a", "b", "b", "a", "b"]
    pairing = optimal_pairing(x0, eps, groups)
    assert [groups[i] for i in pairing] == groups and pairing.tolist() != list(range(12))
    for name in set(groups):
        rows = torch.tensor([i for i, g in enumerate(groups) if g == name])
        assert torch.equal(pairing[rows], rows[optimal_pairing(x0[rows], eps[rows])])
    free = optimal_pairing(x0, eps)
    assert total(x0, eps, free) < total(x0, eps, pairing) < total(x0, eps, torch.arange(12))
    assert optimal_pairing(x0, eps, range(12)).tolist() == list(range(12))


def test_without_values_the_order_stays() -> None:
    pairing = optimal_pairing(*torch.empty(2, 4, 3, device="meta"))
    assert pairing.shape == (4,) and pairing.is_meta
