"""What every search is: candidates, a pipeline with one of them in it, and what of the pipeline changes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ..metrics.protocol import Score

Candidate = dict[str, list[float]]


@dataclass(frozen=True)
class Trial:
    """A candidate and its fitness, higher is better; None where the pictures or the score were not finite."""

    candidate: Candidate
    fitness: float | None


class TrialRow(TypedDict):
    """A line of a search's log, beside the terms of the fitness."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: int
    subject: str
    phase: str
    fitness: Annotated[float, Field(allow_inf_nan=False)] | None
    candidate: dict[str, list[Annotated[float, Field(allow_inf_nan=False)]]]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first; equals in the order in which they were tried; those without a fitness are left out."""
    scored = [t for t in trials if t.fitness is not None]
    return sorted(scored, key=lambda t: -float(t.fitness or 0.0))


@dataclass(frozen=True)
class SearchParts:
    """What a search is built from.

    folder  of the student's pipeline
    run     of the run that made it, None where there is none
    steps   network evaluations a picture
    seed    of the proposals
    budget  candidates of each subject
    """

    folder: Path
    run: Path | None
    steps: int
    seed: int
    budget: int


class Search(ABC):
    """Proposes candidates and puts them into a pipeline; knows no pictures, scores, files or devices.

    Subclasses set `Settings` and `subjects`, what is searched in turn: the first is exported, the others are for
    comparison. What is proposed depends on the settings, the seed and the trials so far alone: an interrupted search
    goes on as if it had not been.
    """

    Settings: ClassVar[type]
    subjects: tuple[str, ...] = ("student",)

    def __init__(self, settings: Any, parts: SearchParts):
        self.settings, self.parts = settings, parts

    def random(self, trials: Sequence[Trial]) -> np.random.Generator:
        """The generator of the next proposal."""
        return np.random.default_rng([self.parts.seed, len(trials)])

    def opened(self, subject: str, pipeline: Any) -> Any:
        """The student's pipeline as this subject; may change it."""
        return pipeline

    @abstractmethod
    def propose(self, trials: Sequence[Trial]) -> Candidate | None:
        """The next candidate of a subject after its `trials`, the baselines first; None when there is no other."""

    @abstractmethod
    def baselines(self, trials: Sequence[Trial]) -> dict[str, Candidate]:
        """What the winner is compared with, by name; all of them were proposed, or {} for the student as it is."""

    def eligible(self, candidate: Candidate) -> bool:
        """Whether it may win: a baseline may where it is one of the points that the search starts from."""
        return True

    @abstractmethod
    def apply(self, pipeline: Any, candidate: Candidate) -> Any:
        """The pipeline with the candidate in it; may change it. {} is the subject as it was opened."""

    @abstractmethod
    def changed(self, pipeline: Any, candidate: Candidate) -> dict[str, Any]:
        """The parts of a pipeline with the candidate applied that differ from the student's folder."""

    def notes(self, candidate: Candidate) -> list[tuple[str, str]]:
        """Rows of the model card."""
        return []

    @abstractmethod
    def verdicts(self, cells: Mapping[str, Score]) -> list[str]:
        """Sentences on the KID of "<subject>-<baseline>" and "<subject>-tuned", fresh noise and prompts."""


def verdict(gain: float, sd: float | None) -> str:
    """ "holds" or "fails" beyond 2 standard deviations, else "not resolved"; without a deviation it cannot be."""
    if sd is None or not abs(gain) > 2 * sd:
        return "not resolved"
    return "holds" if gain > 0 else "fails"


def deviation(weights: Sequence[float], scores: Sequence[Score]) -> float | None:
    """Standard deviation over seeds of a weighted sum of scores; None where a score has none.

    Of the sum seed by seed where every score has its seeds' values: the models saw the same prompts and noise. As of
    independent numbers otherwise.
    """
    if any(s.sd is None for s in scores):
        return None
    if all(s.values for s in scores):
        return stdev(
            sum(w * v for w, v in zip(weights, seed, strict=True))
            for seed in zip(*(s.values for s in scores), strict=True)
        )
    return math.sqrt(sum((w * float(s.sd or 0.0)) ** 2 for w, s in zip(weights, scores, strict=True)))


def compared(first: str, second: str, cells: Mapping[str, Score]) -> str:
    """Whether `first` has a lower KID than `second`."""
    a, b = cells[first], cells[second]
    sd = deviation((1, -1), (b, a))
    spread = "one seed" if sd is None else f"sd {sd:.4f}"
    gain = b.value - a.value
    return f"{first} against {second}: {b.name} lower by {gain:.4f} ({spread}): {verdict(gain, sd)}"
