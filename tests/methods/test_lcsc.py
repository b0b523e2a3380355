"""LCSC and MWA: coefficients, combinations and the search against the values of their specification."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.config.validation import validate
from fewstep.distill.errors import UserError
from fewstep.distill.search.candidates import SearchParts, Trial, ranked
from fewstep.distill.search.checkpoint_set import CheckpointSet
from fewstep.distill.search.evolution import child
from fewstep.distill.search.lcsc import LCSC, ema_alpha, mwa_alpha, to_alpha, uniform_alpha
from fewstep.distill.search.settings import LCSCSettings
from safetensors.torch import save_file

LOSSES, STEPS = np.array([0.9, 0.6, 0.5, 0.45]), np.array([100.0, 200, 300, 400])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.9, [0.6561, 0.0729, 0.081, 0.09, 0.1]),
        (0.5, [0.0625, 0.0625, 0.125, 0.25, 0.5]),
        (0.9999**100, [0.96078752, 0.00965656, 0.00975362, 0.00985165, 0.00995066]),
        (0.0, [0, 0, 0, 0, 1]),
    ],
)
def test_ema_coefficients(rate: float, expected: list[float]) -> None:
    np.testing.assert_allclose(ema_alpha(5, rate), expected, atol=5e-9)
    assert ema_alpha(5, rate).sum() == pytest.approx(1, abs=1e-12)


def test_rate_over_an_interval() -> None:
    assert pytest.approx(0.9900493387, abs=1e-10) == 0.9999**100


@pytest.mark.parametrize(
    ("rate", "count"), [(0.99, 5), (0.999, 47), (0.9995, 93), (0.9999, 461), (0.999943, 808)]
)
def test_checkpoints_that_hold_99_percent_of_an_average(rate: float, count: int) -> None:
    """At interval 100: the newest `count` of very many, and one fewer holds less."""
    alpha = ema_alpha(2000, rate**100)
    assert alpha[-count:].sum() >= 0.99 > alpha[-count + 1 :].sum()


def test_beta_form() -> None:
    theta = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    alpha = to_alpha(np.array([0.9, -0.4]))
    np.testing.assert_allclose(alpha, [0.5, 0.9, -0.4])
    np.testing.assert_allclose(alpha @ theta, [0.9, -0.4])


def test_means_of_windows() -> None:
    assert uniform_alpha(4, 4).tolist() == [0.25] * 4
    assert uniform_alpha(4, 2).tolist() == [0, 0, 0.5, 0.5]
    assert uniform_alpha(4, 1).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("values", "lower", "penalty", "expected"),
    [
        (LOSSES, True, 1, [0.158730, 0.238095, 0.285714, 0.317460]),
        (LOSSES, True, 2, [0.095329, 0.214490, 0.308866, 0.381316]),
        (LOSSES, True, 4, [0.030712, 0.155482, 0.322407, 0.491399]),
        (STEPS, False, 1, [0.1, 0.2, 0.3, 0.4]),
        (STEPS, False, 2, [0.033333, 0.133333, 0.3, 0.533333]),
    ],
)
def test_mwa_powers(values: np.ndarray, lower: bool, penalty: float, expected: list[float]) -> None:
    np.testing.assert_allclose(
        mwa_alpha(values, penalty, "power", lower_is_better=lower), expected, atol=1e-6
    )


@pytest.mark.parametrize("weighting", ["power", "softmax"])
@pytest.mark.parametrize(
    ("values", "lower", "best"), [(LOSSES, True, 3), (-LOSSES + 1, False, 3), (STEPS, False, 3)]
)
def test_mwa_limits(weighting: str, values: np.ndarray, lower: bool, best: int) -> None:
    np.testing.assert_allclose(mwa_alpha(values, 0, weighting, lower_is_better=lower), [0.25] * 4)
    sharp = mwa_alpha(values, 2000, weighting, lower_is_better=lower)
    assert sharp[best] == pytest.approx(1) and np.isfinite(sharp).all()
    plain, scaled = (mwa_alpha(values * k, 3, weighting, lower_is_better=lower) for k in (1, 7))
    np.testing.assert_allclose(plain, scaled)


def test_mwa_softmax() -> None:
    """exp(-p (L - min) / (max - min)); of a constant metric the uniform mean."""
    logits = -2 * (LOSSES - 0.45) / 0.45
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(mwa_alpha(LOSSES, 2, "softmax", lower_is_better=True), expected)
    assert mwa_alpha(np.full(4, 0.3), 2, "softmax", lower_is_better=True).tolist() == [0.25] * 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 6 raw checkpoints of 20 numbers, steps 10 to 60: the quadratic landscape of the specification."""
    rng = np.random.default_rng(0)
    theta = np.cumsum(rng.normal(size=(6, 20)), axis=0)
    (tmp_path / "raw_weights").mkdir()
    for i, row in enumerate(theta):
        tensors = {"a": torch.tensor(row), "ids": torch.arange(3)}
        save_file(tensors, tmp_path / "raw_weights" / f"step-{10 * (i + 1):08d}.safetensors")
    np.save(tmp_path / "target.npy", rng.normal(size=20))
    return tmp_path


def landscape(run: Path, alpha: np.ndarray) -> float:
    combined = CheckpointSet.of(run).combined("a", alpha).numpy()
    return float(np.mean((combined - np.load(run / "target.npy")) ** 2))


def test_landscape(run: Path) -> None:
    singles = [landscape(run, row) for row in np.eye(6)]
    np.testing.assert_allclose(singles, [2.0818, 2.3397, 3.2404, 4.6315, 4.3804, 4.3586], atol=5e-5)
    theta = np.stack([CheckpointSet.of(run).tensor(i, "a").numpy() for i in range(6)])
    moves = (theta[1:] - theta[0]).T
    beta = np.linalg.lstsq(moves, np.load(run / "target.npy") - theta[0], rcond=None)[0]
    np.testing.assert_allclose(to_alpha(beta), [0.998, -0.052, 0.239, -0.251, -0.424, 0.489], atol=6e-4)
    assert landscape(run, to_alpha(beta)) == pytest.approx(1.84640716, abs=1e-8)
    averages = [landscape(run, ema_alpha(6, g)) for g in (0, 0.3, 0.5, 0.7, 0.9, 0.97)]
    assert min(averages) == pytest.approx(2.0925, abs=5e-5)


def searched(
    run: Path, budget: int, seed: int = 0, until: int | None = None, trials: list[Trial] | None = None
):
    settings = validate(LCSCSettings, {"rates": [0, 0.3, 0.5, 0.7, 0.9, 0.97]})
    search, trials = LCSC(settings, SearchParts(run, run, 1, seed, budget)), list(trials or [])
    while len(trials) < (until or budget):
        candidate = search.propose(trials)
        assert candidate is not None and sum(candidate["alpha"]) == pytest.approx(1, abs=1e-9)
        trials.append(Trial(candidate, -landscape(run, np.array(candidate["alpha"]))))
    return search, trials


def test_search_nears_the_optimum(run: Path) -> None:
    search, trials = searched(run, 800)
    start = ranked(trials[: len(search.starts)])[0].fitness
    best = np.maximum.accumulate([t.fitness for t in trials])
    assert -best[-1] < 1.86 and best[-1] >= start  # the specification: below it within 2,000
    assert -best[99] < 2.0  # the best average has 2.09
    alpha = ranked(trials)[0].candidate["alpha"]
    assert min(alpha) < 0 < max(alpha)  # signed, as the optimum is


def test_search_is_determined_by_its_seed_and_resumes(run: Path) -> None:
    _, whole = searched(run, 40)
    assert searched(run, 40)[1] == whole
    assert searched(run, 40, seed=1)[1] != whole
    _, part = searched(run, 40, until=17)
    assert part == whole[:17] and searched(run, 40, trials=part)[1] == whole


def test_population_and_baselines(run: Path) -> None:
    search, trials = searched(run, 20)
    names = search.baselines(trials)
    assert names["student"] == {} and names["last"]["alpha"] == [0, 0, 0, 0, 0, 1]
    assert names["uniform"]["alpha"] == pytest.approx([1 / 6] * 6)
    assert names["ema"]["alpha"] == pytest.approx(ema_alpha(6, 0.97).tolist())  # 2.0925, the best of them


def test_no_candidate_is_finite(run: Path) -> None:
    search, trials = searched(run, 20, until=8)
    with pytest.raises(UserError, match="no candidate of the population has a finite value"):
        search.propose([Trial(t.candidate, None) for t in trials])


def test_mwa_proposes_its_candidates_and_no_more(run: Path) -> None:
    rows = "".join(f'{{"step": {s}, "loss": {10 / s}}}\n' for s in range(5, 65, 5))
    (run / "log.jsonl").write_text(rows)
    settings = validate(LCSCSettings, {"family": "mwa", "penalties": [0, 2]})
    search = LCSC(settings, SearchParts(run, run, 1, 0, 10))
    losses = np.array([(10 / (s - 5) + 10 / s) / 2 for s in range(10, 70, 10)])
    np.testing.assert_allclose(search.checkpoints.losses(), losses)
    trials: list[Trial] = []
    while (candidate := search.propose(trials)) is not None:
        trials.append(Trial(candidate, 0.0))
    assert len(trials) == 4
    np.testing.assert_allclose(trials[2].candidate["alpha"], [1 / 6] * 6)
    np.testing.assert_allclose(trials[3].candidate["alpha"], losses**-2 / (losses**-2).sum())
    by_step = LCSC(
        validate(LCSCSettings, {"family": "mwa", "metric": "step", "penalties": [1]}), search.parts
    )
    np.testing.assert_allclose(by_step.starts[2], np.arange(1, 7) / 21)


def test_losses_that_were_not_logged(run: Path) -> None:
    (run / "log.jsonl").write_text('{"step": 20, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"no loss between steps 0 and 10; train with --logging_steps 10"):
        LCSC(validate(LCSCSettings, {"family": "mwa"}), SearchParts(run, run, 1, 0, 10))


def test_windows_and_their_errors(run: Path) -> None:
    search = LCSC(
        validate(LCSCSettings, {"family": "uniform", "windows": [2, 3]}), SearchParts(run, run, 1, 0, 10)
    )
    assert search.starts[2].tolist() == [0, 0, 0, 0, 0.5, 0.5]
    for tree, message in (
        ({"family": "uniform", "windows": [7]}, r"method\.windows: 7, but there are 6"),
        ({"rates": [1.0]}, r"method\.rates: 1\.0"),
        ({"last": 9}, r"method\.last: 9, but .* holds 6"),
    ):
        with pytest.raises(UserError, match=message):
            LCSC(validate(LCSCSettings, tree), SearchParts(run, run, 1, 0, 100))
    with pytest.raises(UserError, match="max_candidates: 5, but the population alone has 10"):
        LCSC(validate(LCSCSettings, {}), SearchParts(run, run, 1, 0, 5))
    with pytest.raises(UserError, match="needs the folder of a run"):
        LCSC(validate(LCSCSettings, {}), SearchParts(run, None, 1, 0, 5))


def test_children_are_mixes_with_noise() -> None:
    parents = [np.zeros(50), np.ones(50)]
    mixes = [child(parents, np.random.default_rng(i), sigma=0.0, probability=0.5) for i in range(20)]
    assert all(((c >= 0) & (c <= 1)).all() for c in mixes)
    picked = [c for c in mixes if set(c.tolist()) == {0.0, 1.0}]
    assert 3 < len(picked) < 17  # the others are convex: one share for all entries
    assert all(len(set(c.tolist())) == 1 for c in mixes if not any(c is p for p in picked))
    noisy = child([parents[0]] * 2, np.random.default_rng(0), sigma=1.0, probability=0.5)
    assert 10 < (noisy != 0).sum() < 40
    assert (child([parents[0]], np.random.default_rng(0), sigma=1.0, probability=1e-9) != 0).sum() == 1
