"""One step of an evolutionary search over vectors of numbers."""

from collections.abc import Sequence

import numpy as np


def child(
    parents: Sequence[np.ndarray], rng: np.random.Generator, *, sigma: float | np.ndarray, probability: float
) -> np.ndarray:
    """A vector (D,) from two of the parents: per entry one or the other, or a mix of both, then Gaussian noise.

    sigma        of the noise, a number or (D,)
    probability  of noise, for each entry; at least one entry has it
    """
    a, b = (parents[i] for i in rng.permutation(max(len(parents), 2))[:2] % len(parents))
    share = rng.random() if rng.random() < 0.5 else (rng.random(len(a)) < 0.5).astype(float)
    mutated = rng.random(len(a)) < probability
    mutated[rng.integers(len(a))] = True
    return share * a + (1 - share) * b + mutated * rng.normal(size=len(a)) * sigma
