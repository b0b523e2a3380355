"""Q-Sched: how coefficients are made, in which order they are tried, and what is claimed of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fewstep.distill.config.validation import validate
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.protocol import Protocol, Score
from fewstep.distill.search.candidates import Candidate, SearchParts, Trial, compared, deviation, ranked
from fewstep.distill.search.q_sched import QSched, coefficients, dimensions, won_back
from fewstep.distill.search.settings import QSchedSettings

FULL: dict[str, Any] = {"quantisation": None}


def search(steps: int = 4, budget: int = 1000, seed: int = 0, **settings: Any) -> QSched:
    parts = SearchParts(Path("student"), None, steps, seed, budget)
    return QSched(validate(QSchedSettings, {**FULL, **settings}), parts)


def tried(s: QSched, count: int, fitness=lambda c: 0.0, trials: list[Trial] | None = None) -> list[Trial]:
    trials = list(trials or [])
    while len(trials) < count and (candidate := s.propose(trials)) is not None:
        trials.append(Trial(candidate, fitness(candidate)))
    return trials


@pytest.mark.parametrize(
    ("family", "values", "steps", "expected"),
    [
        ("constant", [0.9], 3, [0.9, 0.9, 0.9]),
        ("ramp_to_one", [0.8], 3, [0.8, 0.9, 1.0]),
        ("ramp_to_one", [0.8], 1, [0.8]),
        ("ramp", [0.955, 1.099], 4, [0.955, 1.003, 1.051, 1.099]),  # the published example, SDXL-Turbo
        ("ramp", [1.012, 0.967], 4, [1.012, 0.997, 0.982, 0.967]),
        ("ramp", [0.955, 1.099], 1, [0.955]),
        ("free", [0.7, 1.2], 2, [0.7, 1.2]),
    ],
)
def test_families(family: str, values: list[float], steps: int, expected: list[float]) -> None:
    assert coefficients(family, values, steps) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["constant", "ramp_to_one", "ramp", "free"])
@pytest.mark.parametrize("steps", [1, 4])
def test_values_of_a_candidate(family: str, steps: int) -> None:
    s = search(steps, family=family, strategy="evolution")
    values = np.random.default_rng(0).uniform(0.8, 1.2, 2 * dimensions(family, steps))
    candidate = s.candidate(values)
    assert len(candidate["c_eps"]) == len(candidate["c_x"]) == steps
    assert s.candidate(s.values(candidate)) == candidate
    if steps == 4:
        assert s.values(candidate) == pytest.approx(values)


def test_official_grid() -> None:
    """10 x 10 in 0.8 to 1.1, c_eps the slower axis; the identity, which is on it, is tried first and once."""
    trials = tried(search(), 1000)
    assert trials[0].candidate == {"c_eps": [1.0] * 4, "c_x": [1.0] * 4}
    axis = np.linspace(0.8, 1.1, 10)
    assert axis[6] == 1.0
    order = [(e, x) for e in axis for x in axis if (e, x) != (1, 1)]
    firsts = [(t.candidate["c_eps"][0], t.candidate["c_x"][0]) for t in trials[1:]]
    np.testing.assert_allclose(firsts, order)
    assert trials[1].candidate["c_eps"] == pytest.approx(np.linspace(0.8, 1, 4).tolist())


def test_a_grid_without_the_identity_has_it_all_the_same() -> None:
    """The official script's 50 points in 0.8 to 1.2 miss 1.0."""
    trials = tried(search(points=4, c_eps=[0.8, 1.2], c_x=[0.8, 1.2]), 100)
    assert len(trials) == 17 and trials[0].candidate["c_x"] == [1.0] * 4


def test_a_grid_that_holds_the_identity_tries_it_once() -> None:
    trials = tried(search(points=5, c_eps=[0.9, 1.1], c_x=[0.9, 1.1]), 100)
    assert len(trials) == 25 and len({str(t.candidate) for t in trials}) == 25


def test_a_grid_beyond_the_budget_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"10 points on 4 axes has 10001 candidates .* max_candidates is 1000"
    ):
        search(family="ramp")
    assert len(tried(search(family="ramp", points=3), 1000)) == 82


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c_eps": [1.1, 0.9]}, r"method\.c_eps: 1\.1 is above 0\.9"),
        ({"c_x": [1.1, 0.9]}, r"method\.c_x: 1\.1 is above 0\.9"),
    ],
)
def test_ranges_the_wrong_way_round(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(**settings)


def away_from(target: np.ndarray):
    def fitness(candidate: Candidate) -> float:
        return -float(np.square(np.array([*candidate["c_eps"], *candidate["c_x"]]) - target).sum())

    return fitness


def test_evolution_nears_an_optimum_and_resumes() -> None:
    target = np.array([0.95, 1.0, 1.02, 1.05, 1.01, 1.0, 0.97, 0.95])
    s = search(family="free", strategy="evolution", budget=300)
    trials = tried(s, 300, away_from(target))
    best = ranked(trials)[0].fitness
    assert trials[0].candidate == s.identity()
    assert best > -0.001 > ranked(trials[:30])[0].fitness
    assert tried(s, 300, away_from(target), trials[:123]) == trials
    assert (
        tried(search(family="free", strategy="evolution", budget=300, seed=1), 20, away_from(target))
        != trials[:20]
    )


def test_evolution_stays_in_its_ranges_at_first_and_mutates_less_later() -> None:
    s = search(family="free", strategy="evolution", budget=100, c_eps=[1.2, 1.3], c_x=[0.7, 0.7])
    trials = tried(s, 10)
    assert all(1.2 <= v <= 1.3 for t in trials[1:] for v in t.candidate["c_eps"])
    assert all(v == 0.7 for t in trials[1:] for v in t.candidate["c_x"])
    equal = [Trial(trials[1].candidate, 0.0)]
    steps = [
        np.abs(s.evolved(equal * n) - s.values(trials[1].candidate)).max() for n in (10, 90)
    ]  # of copies of one candidate all that changes is the noise
    assert 0 < steps[1] < steps[0]


def test_ties_and_candidates_without_a_value() -> None:
    a, b, c = ({"c_eps": [float(i)], "c_x": [1.0]} for i in range(3))
    trials = [Trial(a, None), Trial(b, 2.0), Trial(c, 2.0), Trial(a, float("-inf"))]
    assert [t.candidate for t in ranked(trials)] == [b, c, a]
    s = search(1, strategy="evolution", budget=50)
    assert s.propose([Trial(a, None)] * 20) is not None  # nothing finite: still drawn from the ranges


def score(value: float, sd: float | None) -> Score:
    texts = dict.fromkeys(
        ("definition", "extractor", "extractor_weights_sha256", "input", "resize", "layer", "reference",
         "reference_sha256", "conditioning", "prompts_sha256", "seed_rule"), "-",
    )  # fmt: skip
    return Score("KID", value, sd, Protocol(metric="KID", dim=1, n_ref=1, n_gen=1, image_size=1, **texts))


@pytest.mark.parametrize(
    ("full", "identity", "tuned", "sd", "expected"),
    [
        (0.10, 0.30, 0.12, 0.01, "0.2000, won back by the tuned schedule: 0.1800 (90%): half of it won back: holds"),
        (0.10, 0.30, 0.28, 0.01, "(10%): half of it won back: fails"),
        (0.10, 0.30, 0.19, 0.01, "(55%): half of it won back: not resolved"),
        (0.10, 0.12, 0.05, 0.02, "lost by quantisation: 0.0200, within 2 sd: half of it won back: not resolved"),
        (0.10, 0.30, 0.12, None, "within 2 sd: half of it won back: not resolved"),
        (0.30, 0.10, 0.02, 0.01, "within 2 sd: half of it won back: not resolved"),  # it gained
    ],
)  # fmt: skip
def test_half_won_back(full: float, identity: float, tuned: float, sd: float | None, expected: str) -> None:
    assert won_back(score(full, sd), score(identity, sd), score(tuned, sd)).endswith(expected)


def test_the_margin_of_half_has_the_deviation_of_its_sum() -> None:
    """(0.3 + 0.1) / 2 - tuned with sd sqrt(0.5) x and 1 x: 2 sd = 2 * 0.01 * sqrt(1.5) = 0.0245."""
    for tuned, result in ((0.2 - 0.025, "holds"), (0.2 - 0.024, "not resolved"), (0.2 + 0.025, "fails")):
        assert won_back(score(0.1, 0.01), score(0.3, 0.01), score(tuned, 0.01)).endswith(result)


def test_the_gain_of_the_unquantised_student_stands_apart() -> None:
    pytest.importorskip("torchao")
    s = search(quantisation="w4a8")
    assert s.subjects == ("quantised", "full")
    assert search(quantisation="w4a8", control=False).subjects == ("quantised",)
    cells = {
        f"{subject}-{name}": replace(score(value, 0.001), name="KID-x")
        for (subject, name), value in {
            ("quantised", "identity"): 0.3, ("quantised", "tuned"): 0.25,
            ("full", "identity"): 0.2, ("full", "tuned"): 0.1,
        }.items()
    }  # fmt: skip
    assert s.verdicts(cells) == [
        "quantised-tuned against quantised-identity: KID-x lower by 0.0500 (sd 0.0014): holds",
        "full-tuned against full-identity: KID-x lower by 0.1000 (sd 0.0014): holds",
        "KID-x lost by quantisation: 0.1000, won back by the tuned schedule: 0.0500 (50%): half of it won back: "
        "not resolved",
    ]


def test_the_deviation_of_a_difference_is_taken_seed_by_seed() -> None:
    """Values that rise together: the difference of 0.02, 0.02, 0.05 has sd sqrt(3) / 100, not their own 0.1."""
    first, second = (0.1, 0.2, 0.3), (0.12, 0.22, 0.35)
    a, b = (Score.over_seeds("KID", values, score(0, 0).protocol) for values in (first, second))
    assert a.sd == pytest.approx(0.1) and a.values == first
    assert deviation((1, -1), (b, a)) == pytest.approx(3**0.5 / 100)
    alone = replace(a, values=())
    assert deviation((1, -1), (b, alone)) == pytest.approx((a.sd**2 + b.sd**2) ** 0.5)
    assert (
        compared("x", "y", {"x": a, "y": b}) == "x against y: KID lower by 0.0300 (sd 0.0173): not resolved"
    )
    steady = Score.over_seeds("KID", (0.12, 0.22, 0.33), a.protocol)
    assert compared("x", "y", {"x": a, "y": steady}).endswith("lower by 0.0233 (sd 0.0058): holds")
    assert Score.from_json(a.to_json()) == a
    old = {k: v for k, v in a.to_json().items() if k != "values"}
    assert Score.from_json(old).values == ()
