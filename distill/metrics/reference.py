"""The real pictures that generated ones are measured against."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import cache_directory
from ..data.images import ImageData
from ..data.records import Records
from ..data.sources import load_data
from ..errors import UserError
from .extractor import Extractor, extract
from .frechet import Moments, frechet_distance
from .kid import DEFINITION, between, within
from .manifold import COVERAGE_NEIGHBOURS, PRECISION_NEIGHBOURS, radii
from .neighbours import unseen_distance
from .protocol import LIBRARIES, hash_pictures
from .squares import squares_of

ORDER_SEED = 0
CHUNK = 1024


def reference(
    data: str, split: str, resolution: int, data_options: Mapping[str, Any] | None = None
) -> tuple[Tensor, list[str]]:
    """Real pictures uint8 (N, 3, H, W) and captions of a split, rows in one fixed random order (seed 0).

    So the first rows are a fair sample of any size. `data_options` go to `load_data` (caption_column, ...).
    """
    rows, order = in_order(data, split, resolution, data_options)
    return rows.images(order), [rows.captions[i] for i in order]


def captions_of(data: str, split: str, data_options: Mapping[str, Any] | None = None) -> list[str]:
    """The captions of `reference`, without a look at the pictures."""
    rows, order = in_order(data, split, 1, data_options)
    return [rows.captions[i] for i in order]


def labels_of(
    data: str, split: str, data_options: Mapping[str, Any] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """The class labels of `reference`, and the names of the classes. Raises UserError if the data have none."""
    rows, order = in_order(data, split, 1, data_options)
    labels = rows.labels
    return [labels[i] for i in order], rows.classes


def places_of(
    data: str, split: str, data_options: Mapping[str, Any] | None = None
) -> list[tuple[str, str, int]]:
    """(data, split, row) of the pictures of `reference`."""
    return [(data, split, i) for i in in_order(data, split, 1, data_options)[1]]


def in_order(
    data: str, split: str, resolution: int, data_options: Mapping[str, Any] | None
) -> tuple[ImageData, list[int]]:
    """A split and the fixed random order of its rows, of which those of a folder are sorted by path, or stand as in its
    metadata."""
    rows = load_data(data, split=split, resolution=resolution, **(data_options or {}))
    return rows, torch.randperm(len(rows), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()


@dataclass(frozen=True, eq=False)
class Reference:
    """A split's captions (N) and features (N, D), with the parts of scores that do not depend on a model."""

    name: str
    sha256: str
    captions: list[str]
    features: Tensor

    @cached_property
    def moments(self) -> Moments:
        return Moments.of(self.features)

    @cached_property
    def within(self) -> float:
        return _remembered(f"KID within, {DEFINITION}", [self.features], lambda: within(self.features))

    @cached_property
    def reach(self) -> Tensor:
        """Radii of the balls of precision and recall, and of density and coverage: float64 (2, N)."""
        return radii(self.features, (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS))

    @cached_property
    def _heads(self) -> dict[int, "Reference"]:
        return {}

    def head(self, n: int) -> "Reference":
        """The first n pictures: the same object for the same n, so that what it computed is kept."""
        if n not in self._heads:
            first = replace(self, name=f"{self.name}, first {n}", features=self.features[:n])
            self._heads[n] = first
        return self._heads[n]

    def distance_of(self, unseen: "Reference") -> float:
        """Median distance of unseen real pictures to their nearest ones here."""
        parts = [unseen.features, self.features]
        return _remembered("NN distance", parts, lambda: unseen_distance(*parts))

    @property
    def captioned(self) -> bool:
        """Whether there are captions to tell apart."""
        return len(set(self.captions)) > 1

    def kid(self, generated: Tensor, own: float | None = None) -> float:
        """KID of features (M, D) to this split; `own`: kid.within of them where it is at hand."""
        own = within(generated) if own is None else own
        return self.within + own - 2 * between(self.features, generated)

    def frechet(self, generated: Tensor) -> float:
        """Frechet distance of features (M, D) to this split."""
        return frechet_distance(self.moments, Moments.of(generated))


def load_reference(
    network: Extractor,
    data: str,
    split: str,
    resolution: int,
    *,
    batch_size: int = 64,
    data_options: Mapping[str, Any] | None = None,
) -> Reference:
    """The split's Reference. Features are computed once and kept under the hash of pixels and captions.

    Raises UserError on data that cannot be read or fewer than 2 pictures.
    """
    rows, order = in_order(data, split, resolution, data_options)
    if len(rows) < 2:
        raise UserError(f"data {data}: split {split!r} has {len(rows)} pictures; scores need at least 2")
    captions = [rows.captions[i] for i in order]
    chunks = (rows.images(order[i : i + CHUNK]) for i in range(0, len(order), CHUNK))
    sha256 = hash_pictures(chunks, (len(rows), 3, resolution, resolution), captions)
    versions = " ".join(version(name) for name in LIBRARIES)
    key = f"real {sha256} {network.name} {network.weights_sha256} {network.resize} {network.layer} {versions}"
    records = Records(cache_directory() / "features", key, len(rows))

    def features(start: int, stop: int) -> dict[str, Tensor]:
        return {"features": extract(network, rows.images(order[start:stop]), batch_size)}

    records.build(features, batch_size, None, True, lambda: None)
    cut = squares_of(rows).cut
    name = f"{Path(data).name}/{split}" + (f", {cut}" if cut else "")
    return Reference(name, sha256, captions, records.read(range(len(rows)))["features"])


def _remembered(name: str, features: Sequence[Tensor], compute: Callable[[], float]) -> float:
    """A number of real pictures alone, computed once and kept under the hash of their features."""
    digest = hashlib.sha256()
    for x in features:
        digest.update(x.contiguous().numpy())
    key = f"{name} {digest.hexdigest()} torch {version('torch')}"
    records = Records(cache_directory() / "features", key, 1)

    def fill(start: int, stop: int) -> dict[str, Tensor]:
        return {"value": torch.tensor([[compute()]], dtype=torch.float64)}

    records.build(fill, 1, None, True, lambda: None)
    return float(records.read(range(1))["value"])
