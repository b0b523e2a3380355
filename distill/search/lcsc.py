"""LCSC (arXiv 2404.02241): one set of weights from many saved ones; MWA (arXiv 2504.18580) without a search."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.protocol import Score
from .candidates import Candidate, Search, SearchParts, Trial, compared, ranked
from .checkpoint_set import CheckpointSet
from .combine import open_space
from .evolution import child
from .settings import LCSCSettings


def ema_alpha(count: int, rate: float) -> np.ndarray:
    """Coefficients of an EMA that starts at the first of `count` checkpoints and folds the others in, (K,)."""
    powers = rate ** np.arange(count - 1, -1, -1.0)
    return np.concatenate([powers[:1], (1 - rate) * powers[1:]])


def uniform_alpha(count: int, window: int) -> np.ndarray:
    """The mean of the last `window` of `count` checkpoints, (K,)."""
    return np.concatenate([np.zeros(count - window), np.full(window, 1 / window)])


def mwa_alpha(values: np.ndarray, penalty: float, weighting: str, *, lower_is_better: bool) -> np.ndarray:
    """Coefficients from a metric of each checkpoint (K,), positive; penalty 0 is uniform, infinity picks the best."""
    if weighting == "softmax":
        span = values.max() - values.min()
        rank = (values - values.min()) / span if span > 0 else np.zeros_like(values)
        logits = -penalty * (rank if lower_is_better else 1 - rank)
    else:
        logits = (-penalty if lower_is_better else penalty) * np.log(values)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def to_alpha(beta: np.ndarray) -> np.ndarray:
    """theta_1 + sum beta_i (theta_i - theta_1) as coefficients: (K-1,) -> (K,), which sum to 1."""
    return np.concatenate([[1 - beta.sum()], beta])


class LCSC(Search):
    Settings = LCSCSettings

    def __init__(self, settings: LCSCSettings, parts: SearchParts):
        super().__init__(settings, parts)
        s = settings
        if parts.run is None:
            raise UserError(
                "student.path: LCSC needs the folder of a run with raw_weights/, made by --raw_weights.every"
            )
        self.checkpoints = CheckpointSet.of(parts.run, s.last)
        count = len(self.checkpoints)
        for window in s.windows if s.family == "uniform" else ():
            if not 1 <= window <= count:
                raise UserError(f"method.windows: {window}, but there are {count} checkpoints; leave it out")
        for rate in s.rates:
            if not 0 <= rate < 1:
                raise UserError(f"method.rates: {rate} is no rate of an average; give 0 to below 1")
        self.starts = self.starting_points()
        if s.family == "evolution" and parts.budget <= len(self.starts):
            raise UserError(
                f"max_candidates: {parts.budget}, but the population alone has {len(self.starts)}; raise it"
            )

    def starting_points(self) -> list[np.ndarray]:
        """The candidates before any evolution: last, uniform, and those of the family."""
        s, count = self.settings, len(self.checkpoints)
        own = [ema_alpha(count, rate) for rate in s.rates]
        if s.family == "uniform":
            own = [uniform_alpha(count, window) for window in s.windows]
        elif s.family == "mwa":
            lower = s.metric == "loss"
            values = np.array(self.checkpoints.losses() if lower else self.checkpoints.steps, dtype=float)
            own = [mwa_alpha(values, p, s.weighting, lower_is_better=lower) for p in s.penalties]
        return [uniform_alpha(count, 1), uniform_alpha(count, count), *own]

    def opened(self, subject: str, pipeline: Any) -> Any:
        self.space = open_space(self.settings.space, pipeline, self.parts.folder, self.checkpoints)
        return pipeline

    def propose(self, trials: Sequence[Trial]) -> Candidate | None:
        s, done = self.settings, len(trials)
        if done < len(self.starts):
            return {"alpha": self.starts[done].tolist()}
        if s.family != "evolution":
            return None
        rng = self.random(trials)
        betas = [np.array(t.candidate["alpha"][1:]) for t in ranked(trials)[: s.num_parents]]
        if not betas:
            raise UserError(
                "fitness: no candidate of the population has a finite value; look at the student's pictures"
            )
        spread = float(np.std([a[1:].tolist() for a in self.starts]))
        sigma = s.sigma * spread * 0.1 ** (done / self.parts.budget)
        return {"alpha": to_alpha(child(betas, rng, sigma=sigma, probability=s.probability)).tolist()}

    def baselines(self, trials: Sequence[Trial]) -> dict[str, Candidate]:
        """The student as its run exported it, the last raw weights, their mean and the best EMA of them."""
        names = {"student": {}, "last": trials[0].candidate, "uniform": trials[1].candidate}
        if self.settings.family in ("evolution", "ema"):
            averages = ranked(trials[2 : len(self.starts)])
            names |= {"ema": averages[0].candidate} if averages else {}
        return names

    def eligible(self, candidate: Candidate) -> bool:
        plain = [start.tolist() for start in self.starts[:2]]
        return self.settings.family == "evolution" or candidate["alpha"] not in plain

    def apply(self, pipeline: Any, candidate: Candidate) -> Any:
        self.space.load(np.array(candidate["alpha"]) if candidate else None)
        return pipeline

    def changed(self, pipeline: Any, candidate: Candidate) -> dict[str, Any]:
        return {self.space.name: self.space.network} if candidate else {}

    def notes(self, candidate: Candidate) -> list[tuple[str, str]]:
        steps = self.checkpoints.steps
        alpha = ", ".join(f"{a:.3g}" for a in candidate["alpha"]) if candidate else "the run's own export"
        return [
            ("combined", f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}, {self.settings.space}"),
            ("coefficients", alpha),
        ]

    def verdicts(self, cells: Mapping[str, Score]) -> list[str]:
        return [compared("student-tuned", name, cells) for name in cells if name != "student-tuned"]
