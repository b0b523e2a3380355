"""Q-Sched (arXiv 2509.01624): two scalars a step that suit the schedule to quantised weights."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from ...pipelines.scheduler_q_sched import BASES
from ..errors import UserError
from ..metrics.protocol import Score
from ..models.quantise import Scheme, need_torchao, quantised
from .candidates import Candidate, Search, SearchParts, Trial, compared, deviation, ranked, verdict
from .evolution import child
from .settings import QSchedSettings

NETWORKS = ("unet", "transformer")


def coefficients(family: str, values: Sequence[float], steps: int) -> list[float]:
    """The coefficient of every step, noisiest first, of 1 value (constant, ramp_to_one), 2 (ramp) or `steps` (free)."""
    if family == "constant":
        return [float(values[0])] * steps
    if family == "free":
        return [float(v) for v in values]
    last = 1.0 if family == "ramp_to_one" else values[1]
    return [float(v) for v in np.linspace(values[0], last, steps)]


def dimensions(family: str, steps: int) -> int:
    """Numbers that stand for one of the two vectors."""
    return {"constant": 1, "ramp_to_one": 1, "ramp": 2, "free": steps}[family]


class QSched(Search):
    Settings = QSchedSettings

    def __init__(self, settings: QSchedSettings, parts: SearchParts):
        super().__init__(settings, parts)
        s = settings
        for key in ("c_eps", "c_x"):
            low, high = getattr(s, key)
            if not low <= high:
                raise UserError(f"method.{key}: {low} is above {high}; swap them")
        self.scheme = None if s.quantisation is None else Scheme.of(s.quantisation)
        if self.scheme is None:
            self.subjects = ("full",)
        else:
            need_torchao("method.quantisation")
            self.subjects = ("quantised", "full") if s.control else ("quantised",)
        size = dimensions(s.family, parts.steps)
        needed = s.points ** (2 * size) + 1
        if s.strategy == "grid" and needed > parts.budget:
            raise UserError(
                f"method.strategy: a grid of {s.points} points on {2 * size} axes has {needed} candidates with the "
                f"identity, max_candidates is {parts.budget}; raise it, or choose evolution"
            )
        self.bounds = [s.c_eps] * size + [s.c_x] * size
        axes = (np.linspace(low, high, s.points) for low, high in self.bounds)
        grid = product(*axes) if s.strategy == "grid" else ()
        self.grid = [values for values in grid if self.candidate(values) != self.identity()]
        self.network: str | None = None

    def opened(self, subject: str, pipeline: Any) -> Any:
        base = type(pipeline.scheduler)
        if base not in BASES:
            known = ", ".join(sorted(b.__name__ for b in BASES))
            raise UserError(f"student.path: its scheduler is {base.__name__}; Q-Sched knows {known}")
        self.stock = pipeline.scheduler
        self.network = None
        if subject == "quantised" and self.scheme is not None:
            self.network = next(n for n in NETWORKS if getattr(pipeline, n, None) is not None)
            part = getattr(pipeline, self.network)
            model = quantised(
                type(part),
                str(self.parts.folder),
                self.scheme,
                convolutions=self.settings.convolutions,
                subfolder=self.network,
            )
            setattr(pipeline, self.network, model.to(part.device))
        return pipeline

    def propose(self, trials: Sequence[Trial]) -> Candidate | None:
        if not trials:
            return self.identity()
        if self.settings.strategy == "evolution":
            return self.candidate(self.evolved(trials))
        return self.candidate(self.grid[len(trials) - 1]) if len(trials) <= len(self.grid) else None

    def evolved(self, trials: Sequence[Trial]) -> np.ndarray:
        """Uniform in the ranges until there are parents, then a child of the best."""
        s, rng = self.settings, self.random(trials)
        low, high = np.array(self.bounds).T
        best = ranked(trials)[: s.num_parents]
        if len(trials) < s.num_parents or len(best) < 2:
            return rng.uniform(low, high)
        sigma = s.sigma * (high - low) * 0.1 ** (len(trials) / self.parts.budget)
        return child([self.values(t.candidate) for t in best], rng, sigma=sigma, probability=0.5)

    def baselines(self, trials: Sequence[Trial]) -> dict[str, Candidate]:
        return {"identity": self.identity()}

    def identity(self) -> Candidate:
        ones = [1.0] * self.parts.steps
        return {"c_eps": ones, "c_x": ones}

    def candidate(self, values: Sequence[float] | np.ndarray) -> Candidate:
        half, family = len(values) // 2, self.settings.family
        halves = {"c_eps": values[:half], "c_x": values[half:]}
        return {k: coefficients(family, list(v), self.parts.steps) for k, v in halves.items()}

    def values(self, candidate: Candidate) -> np.ndarray:
        """The numbers that `candidate` was made of."""
        where = {"ramp": [0, -1], "free": list(range(self.parts.steps))}.get(self.settings.family, [0])
        return np.array([candidate[key][i] for key in ("c_eps", "c_x") for i in where])

    def apply(self, pipeline: Any, candidate: Candidate) -> Any:
        stock = candidate in ({}, self.identity())
        tuned = BASES[type(self.stock)]
        pipeline.scheduler = self.stock if stock else tuned.from_config(self.stock.config, **candidate)
        return pipeline

    def changed(self, pipeline: Any, candidate: Candidate) -> dict[str, Any]:
        networks = {} if self.network is None else {self.network: getattr(pipeline, self.network)}
        return {"scheduler": pipeline.scheduler, **networks}

    def notes(self, candidate: Candidate) -> list[tuple[str, str]]:
        s = self.settings
        layers = "Linear, Conv2d by fake quantisation" if s.convolutions else "Linear"
        rounded = {k: ", ".join(f"{v:.4f}" for v in values) for k, values in candidate.items()}
        return [
            (
                "weights",
                "as the student's" if self.network is None else f"{s.quantisation}: {layers}, by torchao",
            ),
            *rounded.items(),
        ]

    def verdicts(self, cells: Mapping[str, Score]) -> list[str]:
        """The gain over the quantisation, and the unquantised student's own gain, each under its name."""
        out = [compared(f"{s}-tuned", f"{s}-identity", cells) for s in self.subjects]
        if {"quantised-identity", "full-identity"} <= cells.keys():
            out.append(
                won_back(cells["full-identity"], cells["quantised-identity"], cells["quantised-tuned"])
            )
        return out


def won_back(full: Score, identity: Score, tuned: Score) -> str:
    """Whether the tuned schedule wins back half of what quantisation cost at identity coefficients."""
    lost, regained = identity.value - full.value, identity.value - tuned.value
    spread = deviation((1, -1), (identity, full))
    if verdict(lost, spread) != "holds":
        return f"{full.name} lost by quantisation: {lost:.4f}, within 2 sd: half of it won back: not resolved"
    margin = (identity.value + full.value) / 2 - tuned.value  # of the tuned schedule below half the loss
    result = verdict(margin, deviation((0.5, 0.5, -1), (identity, full, tuned)))
    return (
        f"{full.name} lost by quantisation: {lost:.4f}, won back by the tuned schedule: {regained:.4f} "
        f"({regained / lost:.0%}): half of it won back: {result}"
    )
