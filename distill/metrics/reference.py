"""The real pictures that generated ones are measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import load_data
from ..errors import UserError
from .features import Extractor, extract
from .frechet import Moments, frechet_distance
from .kid import between, within
from .protocol import hash_pictures

ORDER_SEED = 0


def reference(
    data: str, split: str, resolution: int, data_options: Mapping[str, Any] | None = None
) -> tuple[Tensor, list[str]]:
    """Real pictures uint8 (N, 3, H, W) and captions of a split, rows in one fixed random order (seed 0).

    So the first rows are a fair sample of any size. `data_options` go to `load_data` (caption_column, ...).
    """
    rows = load_data(data, split=split, resolution=resolution, **(data_options or {}))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
    return rows.images(order), [rows.captions[i] for i in order]


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


_CACHE: dict[tuple[str, str, str, str], Reference] = {}


def load_reference(
    network: Extractor,
    data: str,
    split: str,
    resolution: int,
    *,
    batch_size: int = 64,
    data_options: Mapping[str, Any] | None = None,
) -> Reference:
    """The split's Reference. Features are computed once a process, under the hash of pixels and captions.

    Raises UserError on data that cannot be read or fewer than 2 pictures.
    """
    images, captions = reference(data, split, resolution, data_options)
    if len(images) < 2:
        raise UserError(f"data {data}: split {split!r} has {len(images)} pictures; scores need at least 2")
    name, sha256 = f"{Path(data).name}/{split}", hash_pictures(images, captions)
    key = (network.name, network.weights_sha256, name, sha256)
    if key not in _CACHE:
        _CACHE[key] = Reference(name, sha256, captions, extract(network, images, batch_size))
    return _CACHE[key]
