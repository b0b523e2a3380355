"""How many noise levels a run compares, which pairs of them and how often: recorded values and chi-square tests."""

import math

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.methods.consistency_training.curriculum import (
    continuous_pairs,
    doubling,
    draw_pairs,
    lognormal_bins,
    scheduled_decay,
    square_root,
)
from scipy.stats import chisquare, kstest, norm
from torch import Tensor

DOUBLED = {
    (400000, 10, 1280): {
        0: 11, 49999: 11, 50000: 21, 100000: 41, 150000: 81, 200000: 161, 250000: 321, 300000: 641, 349999: 641,
        350000: 1281, 399999: 1281,
    },
    (800000, 10, 1280): {0: 11, 100000: 21, 400000: 161, 699999: 641, 700000: 1281},
    (1000, 10, 1280): {0: 11, 100: 11, 124: 11, 125: 21, 250: 41, 500: 161, 750: 641, 900: 1281, 1000: 1281},
    (1000, 2, 150): {0: 3, 137: 3, 138: 5, 250: 5, 500: 17, 750: 65, 900: 129, 999: 151},
}  # fmt: skip
P11 = [
    0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980,
]  # fmt: skip
P10 = [0.076837, 0.220388, 0.270700, 0.207635, 0.121237, 0.060129, 0.027001, 0.011415, 0.004657]
WEIGHTS11 = [
    67.931307, 14.627058, 4.288237, 1.545276, 0.645244, 0.300867, 0.152844, 0.083148, 0.047835, 0.028830,
]  # fmt: skip
WEIGHTS10 = [54.243659, 10.394661, 2.830131, 0.969215, 0.389958, 0.176770, 0.087831, 0.046934, 0.026606]
MEAN_WEIGHT = {
    11: 8.4203, 21: 17.4529, 41: 35.1921, 81: 70.5246, 161: 141.119, 321: 282.273, 641: 564.563, 1281: 1129.136,
}  # fmt: skip


@pytest.mark.parametrize(("total", "s0", "s1"), DOUBLED)
def test_the_number_of_levels_doubles_in_equal_stages(total: int, s0: int, s1: int) -> None:
    rows = DOUBLED[total, s0, s1]
    assert {k: doubling(k, total, s0, s1) for k in rows} == rows


def test_each_of_eight_stages_takes_an_eighth_of_the_run() -> None:
    counts = [doubling(k, 400, 10, 1280) for k in range(400)]
    assert counts == [10 * 2**stage + 1 for stage in range(8) for _ in range(50)]


def test_a_run_shorter_than_its_stages_doubles_at_every_step() -> None:
    assert [doubling(k, 4, 10, 1280) for k in range(4)] == [11, 21, 41, 81]
    assert doubling(0, 1, 10, 1280) == 11
    assert {doubling(k, 5, 10, 10) for k in range(5)} == {11}


def test_the_square_root_rule_has_the_recorded_values() -> None:
    rows = {0: 2, 1: 3, 100000: 54, 200000: 76, 400000: 107, 800000: 151}
    assert {k: square_root(k, 800000, 2, 150) for k in rows} == rows
    assert square_root(0, 10, 1, 150) == 2


def test_the_scheduled_decay_starts_at_mu0_and_follows_the_number_of_levels() -> None:
    assert scheduled_decay(3, 2, 0.9) == pytest.approx(0.9, rel=1e-12)
    assert scheduled_decay(151, 2, 0.9) == pytest.approx(0.99859618, abs=5e-9)
    assert scheduled_decay(2, 2, 0.9) == pytest.approx(0.81, rel=1e-12)


@pytest.mark.parametrize(("num_points", "expected"), [(11, P11), (10, P10)])
def test_lognormal_bins_have_the_recorded_probabilities(num_points: int, expected: list[float]) -> None:
    bins = lognormal_bins(EDM().grid(num_points), -1.1, 2.0)
    assert bins.tolist() == pytest.approx(expected, abs=5.1e-7)
    assert bins.sum().item() == pytest.approx(1, abs=1e-14)


def test_lognormal_bins_are_masses_of_a_normal_distribution_of_the_natural_logarithm() -> None:
    sigmas = EDM(0.03, 14.0, rho=5.0).grid(23)
    mass = torch.from_numpy(norm(0.4, 1.3).cdf(sigmas.log().numpy())).diff()
    torch.testing.assert_close(lognormal_bins(sigmas, 0.4, 1.3), mass / mass.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("num_points", "expected"), [(11, WEIGHTS11), (10, WEIGHTS10)])
def test_inverse_gaps_have_the_recorded_values(num_points: int, expected: list[float]) -> None:
    assert (1 / EDM().grid(num_points).diff()).tolist() == pytest.approx(expected, abs=5.1e-7)


@pytest.mark.parametrize("num_points", MEAN_WEIGHT)
def test_the_mean_weight_of_each_stage_has_the_recorded_value(num_points: int) -> None:
    sigmas = EDM().grid(num_points)
    mean = (lognormal_bins(sigmas, -1.1, 2.0) / sigmas.diff()).sum().item()
    assert mean == pytest.approx(MEAN_WEIGHT[num_points], rel=6e-6)


class Given(Draws):
    """Draws whose uniform numbers are given."""

    def __init__(self, numbers: list[float]):
        super().__init__(0, 0, range(len(numbers)))
        self.numbers = torch.tensor(numbers)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.numbers


def test_a_pair_is_the_bin_in_which_its_uniform_number_falls() -> None:
    sigmas = EDM().grid(5)
    bins = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    numbers, index = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999999], [0, 0, 2, 2, 3, 3]
    low, high = draw_pairs(EDM(), 5, bins, Given(numbers))
    assert torch.equal(low, sigmas[index]) and torch.equal(high, sigmas[torch.tensor(index) + 1])


def test_a_number_above_a_rounded_sum_of_bins_falls_into_the_last() -> None:
    low, high = draw_pairs(EDM(), 3, torch.tensor([0.5, 0.4]), Given([0.95]))
    assert high.item() == 80.0 and low.item() == EDM().grid(3)[1].item()


@pytest.mark.parametrize("lognormal", [True, False])
def test_pairs_are_drawn_with_their_probabilities(lognormal: bool) -> None:
    process = EDM()
    sigmas = process.grid(11)
    bins = lognormal_bins(sigmas, -1.1, 2.0) if lognormal else None
    low, high = draw_pairs(process, 11, bins, Draws(0, 0, range(6000)))
    index = torch.searchsorted(sigmas, low)
    assert torch.equal(sigmas[index], low) and torch.equal(sigmas[index + 1], high)
    observed = torch.bincount(index, minlength=10)
    expected = 6000 * (torch.tensor(P11, dtype=torch.float64) if lognormal else torch.full((10,), 0.1))
    expected *= 6000 / expected.sum()
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01


def test_the_pairs_of_a_batch_are_those_of_its_parts() -> None:
    bins = lognormal_bins(EDM().grid(41), -1.1, 2.0)
    for chosen in (bins, None):
        whole = torch.stack(draw_pairs(EDM(), 41, chosen, Draws(3, 5, range(8))))
        parts = [torch.stack(draw_pairs(EDM(), 41, chosen, Draws(3, 5, r))) for r in (range(3), range(3, 8))]
        assert torch.equal(whole, torch.cat(parts, dim=1))
        assert len(whole[1].unique()) > 3


class Logarithms(Draws):
    """Draws whose normal numbers are given."""

    def __init__(self, numbers: list[float]):
        super().__init__(0, 0, range(len(numbers)))
        self.numbers = torch.tensor(numbers)

    def normal(self, shape: object) -> Tensor:
        assert shape == ()
        return self.numbers


@pytest.mark.parametrize(
    ("stage", "q", "k", "b", "expected"),
    [
        (0, 2.0, 8.0, 1.0, [0.0, 0.0, 4.9981841]),
        (3, 2.0, 8.0, 1.0, [0.06999896, 0.80302929, 9.3747730]),
        (1, 4.0, 8.0, 1.0, [0.06999896, 0.80302929, 9.3747730]),
        (0, 2.0, 8.0, 0.0, [0.0, 0.0, 0.0]),
        (7, 2.0, 0.0, 1.0, [0.099609375, 0.99609375, 9.9609375]),
    ],
)
def test_r_of_t_has_the_values_of_the_formula_by_hand(
    stage: int, q: float, k: float, b: float, expected: list[float]
) -> None:
    """At t = 0.1, 1, 10; 1 + 8 sigmoid(-t) is 4.80016650, 3.15153137, 1.00036318."""
    draws = Logarithms([(math.log(t) + 0.4) / 1.3 for t in (0.1, 1.0, 10.0)])
    r, t = continuous_pairs(draws, stage, -0.4, 1.3, q, k, b)
    assert t.tolist() == pytest.approx([0.1, 1.0, 10.0], rel=1e-6)
    assert r.tolist() == pytest.approx(expected, rel=5e-7, abs=0)


def test_pairs_are_cut_to_the_levels_that_a_network_has_seen() -> None:
    """t to the ends, r of the cut t; what is below the first level is the clean data."""
    draws = Logarithms([math.log(t) for t in (0.001, 0.04, 0.1, 1.0, 400.0)])
    r, t = continuous_pairs(draws, 3, 0.0, 1.0, 2.0, 8.0, 1.0, within=(0.03, 15.0))
    assert t.tolist() == pytest.approx([0.03, 0.04, 0.1, 1.0, 15.0], rel=1e-6)
    by_hand = [0.0, 0.04 * (1 - (1 + 8 / (1 + math.exp(0.04))) / 16), 0.06999896, 0.80302929]
    last = 15 * (1 - (1 + 8 / (1 + math.exp(15.0))) / 16)
    assert by_hand[1] < 0.03
    assert r.tolist() == pytest.approx([0.0, 0.0, *by_hand[2:], last], rel=1e-6)


def test_times_are_lognormal_and_the_gap_closes_from_stage_to_stage() -> None:
    draws = [Draws(1, 0, range(2000)) for _ in range(8)]
    pairs = [continuous_pairs(d, stage, -1.1, 2.0, 2.0, 8.0, 1.0) for stage, d in enumerate(draws)]
    t = pairs[0][1]
    assert kstest(t.log().numpy(), norm(-1.1, 2.0).cdf).pvalue > 0.01
    ratios = torch.stack([r / t for r, _ in pairs])
    assert (ratios < 1).all() and (ratios >= 0).all() and (ratios.diff(dim=0) >= 0).all()
    assert (ratios[0] == 0).sum() > 1000 and (ratios[7] > 0.97).all()
