"""Pictures and labels in the IDX files of MNIST and Fashion-MNIST, gzipped or not."""

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserError

FASHION = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGITS = tuple("0123456789")
FASHION_LABELS = {  # sha256 of the labels of Fashion-MNIST, train and test
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
PREFIXES = {"train": "train", "test": "t10k"}
SIDE, PADDING = 28, 2


@dataclass(frozen=True)
class IdxFiles:
    """The four files of a data set with ten classes: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""

    folder: Path
    classes: tuple[str, ...]

    def read(self, split: str) -> tuple[Tensor, tuple[int, ...]]:
        """Pictures uint8 (N, 3, 32, 32), grey in three channels with 2 zero pixels around, and N labels.

        Kept for the next call while the files stay as they are. UserError for a file that is missing, cut short
        or not what its name says.
        """
        files = []
        for kind in ("images-idx3", "labels-idx1"):
            path = _file(self.folder, PREFIXES[split], kind)
            if path is None:
                plain = f"{PREFIXES[split]}-{kind}-ubyte"
                raise UserError(f"{self.folder}: has no {plain} and no {plain}.gz: put one of them there")
            files += [path, path.stat().st_mtime_ns]
        return _read_pair(*files)


def find_idx(folder: Path) -> IdxFiles | None:
    """The IDX files in `folder`, or in a raw/ or */raw/ below it as torchvision stores them; None without any.

    The classes are those of Fashion-MNIST where the nearest folder name with "fashion" or "mnist" in it has
    "fashion", or where no name has either and the labels are Fashion-MNIST's; else "0" to "9".
    Raises UserError when two data sets lie below `folder`.
    """
    found = [f for f in (folder, folder / "raw", *sorted(folder.glob("*/raw"))) if _any_file(f)]
    if len(found) > 1:
        raise UserError(f"{folder}: holds {' and '.join(str(f) for f in found)}: give one of these folders")
    return IdxFiles(found[0], _classes(found[0])) if found else None


def find_fashion(folder: Path) -> IdxFiles | None:
    """The files of `find_idx` if they are Fashion-MNIST's."""
    files = find_idx(folder)
    return files if files and files.classes == FASHION else None


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """The uint8 array in an IDX file: bytes 0, 0, 8, `num_axes`, the big-endian lengths of the axes, the values.

    Raises UserError if it is something else, cut short or damaged.
    """
    remedy = "fetch it again"
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except EOFError:
        raise UserError(f"{path}: is cut short: {remedy}") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}): {remedy}") from error
    start = 4 + 4 * num_axes
    if len(content) < start:
        raise UserError(f"{path}: is cut short, {len(content)} bytes: {remedy}")
    if content[:4] != bytes((0, 0, 8, num_axes)):
        raise UserError(
            f"{path}: is no IDX file of bytes with {num_axes} axes (starts with {content[:4].hex()}): {remedy}"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", num_axes, offset=4))
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path}: has {len(content) - start} bytes where its header says {' x '.join(map(str, shape))}, "
            f"so it was cut short or damaged: {remedy}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=4)
def _read_pair(
    images: Path, images_changed: int, labels: Path, labels_changed: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The pictures and labels of two files; their times of change only tell calls apart."""
    pictures, numbers = read_idx(images, 3), read_idx(labels, 1)
    if pictures.shape[1:] != (SIDE, SIDE) or not len(pictures):
        size = " x ".join(map(str, pictures.shape))
        raise UserError(
            f"{images}: holds {size} values, not pictures of {SIDE} x {SIDE}: give a folder of images"
        )
    if len(pictures) != len(numbers):
        raise UserError(
            f"{images}: holds {len(pictures)} pictures, but {labels.name} {len(numbers)} labels: fetch both again"
        )
    if numbers.max() > 9:
        row = int((numbers > 9).argmax())
        raise UserError(f"{labels}: label {row} is {numbers[row]}, not 0 to 9: give files with ten classes")
    grey = pad(torch.from_numpy(pictures.copy())[:, None], (PADDING,) * 4)
    return grey.expand(-1, 3, -1, -1), tuple(numbers.tolist())


def _file(folder: Path, prefix: str, kind: str) -> Path | None:
    paths = (folder / f"{prefix}-{kind}-ubyte{ending}" for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _any_file(folder: Path) -> bool:
    kinds = ("images-idx3", "labels-idx1")
    return any(_file(folder, prefix, kind) for prefix in PREFIXES.values() for kind in kinds)


def _classes(folder: Path) -> tuple[str, ...]:
    for part in reversed(folder.absolute().parts):
        if re.search("fashion|mnist", part, re.IGNORECASE):
            return FASHION if "fashion" in part.lower() else DIGITS
    labels = [_file(folder, prefix, "labels-idx1") for prefix in PREFIXES.values()]
    hashes = {sha256(read_idx(path, 1).tobytes()).hexdigest() for path in labels if path}
    return FASHION if hashes and hashes <= FASHION_LABELS else DIGITS
