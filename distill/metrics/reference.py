"""The real pictures that generated ones are measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData, load_data
from ..data.cache import Records, cache_directory
from ..errors import UserError
from .features import Extractor, extract
from .frechet import Moments, frechet_distance
from .kid import between, within
from .protocol import hash_pictures
from .report import LIBRARIES

ORDER_SEED = 0
CHUNK = 1024


def reference(
    data: str, split: str, resolution: int, data_options: Mapping[str, Any] | None = None
) -> tuple[Tensor, list[str]]:
    """Real pictures uint8 (N, 3, H, W) and captions of a split, rows in one fixed random order (seed 0).

    So the first rows are a fair sample of any size. `data_options` go to `load_data` (caption_column, ...).
    """
    rows, order = _ordered(data, split, resolution, data_options)
    return rows.images(order), [rows.captions[i] for i in order]


def captions_of(data: str, split: str, data_options: Mapping[str, Any] | None = None) -> list[str]:
    """The captions of `reference`, without a look at the pictures."""
    rows, order = _ordered(data, split, 1, data_options)
    return [rows.captions[i] for i in order]


def labels_of(
    data: str, split: str, data_options: Mapping[str, Any] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """The class labels of `reference`, and the names of the classes. Raises UserError if the data have none."""
    rows, order = _ordered(data, split, 1, data_options)
    labels = rows.labels
    return [labels[i] for i in order], rows.classes


def _ordered(
    data: str, split: str, resolution: int, data_options: Mapping[str, Any] | None
) -> tuple[ImageData, list[int]]:
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
        return within(self.features)

    @property
    def captioned(self) -> bool:
        """Whether there are captions to tell apart."""
        return len(set(self.captions)) > 1

    def kid(self, generated: Tensor) -> float:
        """KID of features (M, D) to this split."""
        return self.within + within(generated) - 2 * between(self.features, generated)

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
    rows, order = _ordered(data, split, resolution, data_options)
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
    name = f"{Path(data).name}/{split}"
    return Reference(name, sha256, captions, records.read(range(len(rows)))["features"])
