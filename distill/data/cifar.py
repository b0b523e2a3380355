"""CIFAR-10 in its Python version: the unpacked batches, or the archive that they come in."""

import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ..errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"


@dataclass(frozen=True)
class Cifar10Files:
    """path: the folder of data_batch_1 to 5, test_batch and batches.meta, or the archive."""

    path: Path
    classes: tuple[str, ...] = CLASSES

    def read(self, split: str) -> tuple[Tensor, tuple[int, ...]]:
        """Pictures uint8 (N, 3, 32, 32) and N labels, kept for the next call while the files stay as they are.

        The batches are pickles: none is opened before its MD5 was found to be the published one.
        UserError for a file that is missing or another.
        """
        files = sorted(self.path.glob("*batch*")) if self.path.is_dir() else [self.path]
        return _read(self.path, split, tuple(file.stat().st_mtime_ns for file in files))


def find_cifar10(folder: Path) -> Cifar10Files | None:
    """The batches in `folder` or in its cifar-10-batches-py/, else its cifar-10-python.tar.gz; None without any."""
    for batches in (folder / FOLDER, folder):
        if (batches / "data_batch_1").is_file() or (batches / "test_batch").is_file():
            return Cifar10Files(batches)
    return Cifar10Files(folder / ARCHIVE) if (folder / ARCHIVE).is_file() else None


@lru_cache(maxsize=4)
def _read(path: Path, split: str, changed: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The split of the batches or the archive at `path`; the times of change only tell calls apart."""
    if path.is_dir():
        return _read_batches(path, split)
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        if not check_integrity(path, CIFAR10.tgz_md5):
            raise UserError(f"{path}: its MD5 is not that of CIFAR-10's archive: fetch it again")
        with TemporaryDirectory() as folder, tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
            return _read_batches(Path(folder) / FOLDER, split)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be unpacked ({error.strerror or error}): unpack it yourself"
        ) from error


def _read_batches(folder: Path, split: str) -> tuple[Tensor, tuple[int, ...]]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    class Batches(CIFAR10):
        base_folder = ""  # the batches lie in the root itself

    try:
        data = Batches(folder, train=split == "train")
    except RuntimeError as error:
        published = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        wrong = [name for name, md5 in published if not check_integrity(folder / name, md5)]
        raise UserError(
            f"{folder}: {', '.join(wrong)} missing or not as published (by MD5): fetch {ARCHIVE} again"
        ) from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): make its files readable") from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), tuple(data.targets)
