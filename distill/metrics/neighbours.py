"""Does a model repeat its training pictures, and does it draw what the caption says?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

OTHER_SEED = 0


def nearest_distance(x: Tensor, reference: Tensor, *, block: int = 4096) -> Tensor:
    """Euclidean distance of each row of x (N, D) to its nearest row of reference (M, D): float64 (N,)."""
    parts = []
    for a in x.split(block):
        rows = [torch.cdist(a.double(), b.double()).amin(1) for b in reference.split(block)]
        parts.append(torch.stack(rows).amin(0))
    return torch.cat(parts)


def unseen_distance(holdout: Tensor, train: Tensor) -> float:
    """Median distance of unseen real pictures (N, D) -> train (M, D). Raises ValueError if half of them are in it."""
    unseen = nearest_distance(holdout, train).median()
    if unseen <= 1e-6 * train.double().norm(dim=1).median():
        raise ValueError("half of the hold-out pictures are training pictures: there is no real distance")
    return float(unseen)


def neighbour_ratio(generated: Tensor, train: Tensor, unseen: float) -> float:
    """Median distance generated -> train over `unseen_distance` of the hold-out.

    Well below 1 the pictures lie nearer to the training set than real pictures do: the model memorises.
    """
    return float(nearest_distance(generated, train).median()) / unseen


@dataclass(frozen=True)
class Share:
    """`hits` of `trials` with the Clopper-Pearson 95 % interval."""

    hits: int
    trials: int

    @property
    def value(self) -> float:
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        low, high = binomtest(self.hits, self.trials).proportion_ci(0.95, method="exact")
        return float(low), float(high)


def match_share(
    generated: Tensor, captions: Sequence[str], reference: Tensor, reference_captions: Sequence[str]
) -> Share:
    """Share of captions whose picture is nearer to a picture of its own caption than to one of another.

    generated (N, D) was made for captions (N); reference (M, D) are the real pictures with their captions.
    The distance is the cosine distance to the nearest picture of a caption, which may have several styles.
    The other caption is drawn once for each caption of the reference, from a fixed seed, whatever N and the
    model. A caption counts once, by its first picture; a tie is a miss.
    Raises ValueError on a caption without a reference picture or a reference with one caption.
    """
    names = list(dict.fromkeys(reference_captions))
    if len(names) < 2:
        raise ValueError("a caption match needs at least 2 different captions")
    index = {c: i for i, c in enumerate(names)}
    groups = torch.tensor([index[c] for c in reference_captions])
    draw = torch.Generator().manual_seed(OTHER_SEED)
    other = torch.randint(len(names) - 1, (len(names),), generator=draw)
    other += (other >= torch.arange(len(names))).long()
    first = {c: i for i, c in reversed(list(enumerate(captions)))}
    unknown = sorted(set(first) - set(index))
    if unknown:
        raise ValueError(f"no reference picture has the caption {unknown[0]!r}")
    wanted = torch.tensor([index[c] for c in first])
    rows = torch.tensor(list(first.values()))
    distance = 1 - F.normalize(generated[rows].double(), dim=1) @ F.normalize(reference.double(), dim=1).T
    of_caption = torch.full((len(rows), len(names)), torch.inf, dtype=torch.float64)
    of_caption.scatter_reduce_(1, groups.expand(len(rows), -1), distance, "amin")
    own, rival = (of_caption.gather(1, g[:, None]) for g in (wanted, other[wanted]))
    return Share(int((own < rival).sum()), len(rows))
