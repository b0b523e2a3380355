"""Random numbers that depend on (seed, iteration, row) alone, with the right distributions."""

import hashlib

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws, mix
from scipy import stats
from torch import Tensor


def everything(draws: Draws) -> Tensor:
    """(B, 8): one draw of each kind after another, as a method makes them."""
    first = draws.normal((2, 3)).flatten(1)
    second = torch.stack([draws.integers(0, 1000).float(), draws.uniform(5, 15)], dim=1)
    return torch.cat([first, second], dim=1)


def test_rows_do_not_depend_on_the_batch_split_or_the_order() -> None:
    whole = everything(Draws(3, 7, range(6)))
    halves = torch.cat([everything(Draws(3, 7, range(3))), everything(Draws(3, 7, range(3, 6)))])
    assert torch.equal(whole, halves)
    assert torch.equal(whole[[4, 1]], everything(Draws(3, 7, [4, 1])))
    assert torch.equal(whole, everything(Draws(3, 7, range(6))))


def test_another_seed_iteration_or_row_gives_unrelated_numbers() -> None:
    """200 numbers each: neighbours correlate no more than chance allows (5 standard deviations)."""
    variants = [Draws(s, i, [r]).normal((200,)) for s, i, r in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    correlation = torch.corrcoef(torch.cat(variants))
    assert (correlation - torch.eye(4)).abs().max() < 5 / 200**0.5


def test_successive_draws_of_a_row_differ() -> None:
    draws = Draws(0, 0, range(2))
    assert not torch.equal(draws.normal((4,)), draws.normal((4,)))
    assert not torch.equal(draws.uniform(), draws.uniform())


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = everything(Draws(0, 0, range(2)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, everything(Draws(0, 0, range(2))))


def test_shapes_and_types() -> None:
    draws = Draws(0, 0, range(5))
    assert draws.normal((4, 8, 8)).shape == (5, 4, 8, 8)
    assert draws.normal((4, 8, 8)).dtype == draws.uniform().dtype == torch.float32
    assert draws.integers(0, 50).dtype == torch.int64
    assert draws.uniform().shape == draws.integers(0, 50).shape == (5,)


def test_distributions_over_rows() -> None:
    """Kolmogorov-Smirnov and chi-square over 2,000 rows: that is where a batch's numbers come from."""
    draws = Draws(0, 0, range(2000))
    assert stats.kstest(draws.normal((1,)).flatten().numpy(), "norm").pvalue > 1e-3
    uniform = draws.uniform(5.0, 15.0)
    assert stats.kstest(uniform.numpy(), "uniform", args=(5.0, 10.0)).pvalue > 1e-3
    assert uniform.min() >= 5 and uniform.max() < 15
    counts = draws.integers(3, 13).bincount(minlength=13)
    assert counts[:3].sum() == 0 and len(counts) == 13
    assert stats.chisquare(counts[3:].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("numbers", [(0, 0, 0), (3, 7, 12), (2**40, 1)])
def test_mix_is_half_of_the_little_endian_blake2b_of_the_numbers(numbers: tuple[int, ...]) -> None:
    text = "(" + ", ".join(str(n) for n in numbers) + ")"
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2
    assert mix(*numbers) == expected < 2**63


def test_recorded_values_of_a_row() -> None:
    """A changed generator or seed rule would silently end the resume of old runs on the same trajectory."""
    draws = Draws(0, 1, [2])
    values = [mix(0, 1, 2), round(draws.normal((1,)).item(), 6), int(draws.integers(0, 1000))]
    assert values == [5458876493991123480, -0.412025, 715]
