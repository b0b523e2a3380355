"""Means and covariances of reference features on disk, with what they are of."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from ..metrics.extractor import Extractor, extract
from ..metrics.frechet import Accumulator, Moments
from ..metrics.inception import RESIZES, SHA256, InceptionFID, sha256_of
from ..writers import scratch_of
from .archives import batches


@dataclass(frozen=True)
class Statistics:
    """Moments with the id of their pictures, crop and extractor, and the hash of the file they came from."""

    moments: Moments
    id: str
    sha256: str


def extractor_id(network: Extractor) -> str:
    """What makes two networks' features the same: weights, layer and resize rule."""
    return f"{network.weights_sha256[:12]} | {network.layer} | {network.resize}"


def published_inception_id(resize: str) -> str:
    """extractor_id of pool3 of the published weights, without having them."""
    return f"{SHA256[:12]} | 2048 ({InceptionFID.LAYER_TEXT['2048']}) | {RESIZES[resize][1]}"


def moments_of(
    network: Extractor, pictures: Iterable[Tensor], *, batch_size: int = 64, progress: bool = True
) -> Moments:
    """Moments of the features of pictures uint8 (3, H, W), where the network lives; D features are kept at most.

    Up to D pictures the rows are kept, so that the small-sample path of frechet_distance is exact.
    """
    held: list[Tensor] = []
    sums = Accumulator()
    with tqdm(unit="image", disable=not progress) as bar:
        for images in batches(pictures, batch_size):
            held.append(extract(network, images, batch_size))
            bar.update(len(images))
            if sums.n or sum(map(len, held)) > network.num_features:
                sums.update(torch.cat(held))
                held = []
    return sums.moments() if sums.n else Moments.of(torch.cat(held) if held else torch.empty(0, 0))


def save_statistics(path: Path, moments: Moments, statistics_id: str) -> Statistics:
    """Writes n, mu, sigma and the id, whole or not at all."""
    part = scratch_of(path)
    with part.open("wb") as file:
        np.savez(file, n=moments.n, mu=moments.mean.numpy(), sigma=moments.matrix.numpy(), id=statistics_id)
    part.replace(path)
    return Statistics(moments, statistics_id, sha256_of(path))


def read_statistics(path: Path, expected_id: str) -> Statistics:
    """A file of save_statistics. Raises UserError if it is another's, unreadable or of another id."""
    arrays = _load(path)
    if not {"n", "mu", "sigma", "id"} <= arrays.keys():
        raise UserError(f"{path}: states no id and number of pictures; import it with an explicit id")
    found = str(arrays["id"])
    if found != expected_id:
        raise UserError(f"{path}: statistics of [{found}], not of [{expected_id}]; give others")
    return Statistics(_moments(path, arrays, ("mu", "sigma"), int(arrays["n"])), found, sha256_of(path))


def import_statistics(
    path: Path, *, stated_id: str, n: int, keys: tuple[str, str] = ("mu", "sigma")
) -> Statistics:
    """A plain file of mean and covariance (EDM, ADM: mu, sigma; MeanFlow: ref_mu, ref_sigma).

    Such a file does not say what it is of: `stated_id` and `n` do. One that says so must agree. Raises UserError
    otherwise, and on wrong keys, shapes or values.
    """
    if not stated_id:
        raise UserError(f"{path}: plain statistics need an explicitly stated id")
    arrays = _load(path)
    if "id" in arrays:
        return read_statistics(path, stated_id)
    return Statistics(_moments(path, arrays, keys, n), stated_id, sha256_of(path))


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files if k in ("n", "mu", "sigma", "id", "ref_mu", "ref_sigma")}
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: no readable .npz of statistics ({error}); give another") from None


def _moments(path: Path, arrays: dict[str, np.ndarray], keys: tuple[str, str], n: int) -> Moments:
    if not set(keys) <= arrays.keys():
        held = ", ".join(arrays) or "none of mu, sigma, ref_mu, ref_sigma"
        raise UserError(f"{path}: has {held}, not {' and '.join(keys)}")
    mean, covariance = (torch.from_numpy(np.array(arrays[k], dtype=np.float64)) for k in keys)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or n < 2:
        raise UserError(f"{path}: mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}, n {n}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path}: holds values that are not finite; prepare it again")
    if (covariance - covariance.T).abs().max() > 1e-6 * covariance.abs().max():
        raise UserError(f"{path}: {keys[1]} is not symmetric; prepare it again")
    return Moments(n, mean, covariance=covariance)
