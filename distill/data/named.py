"""Data sets with ten classes, by name or by the folder of their files: Fashion-MNIST and CIFAR-10."""

import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from filelock import FileLock
from torch import Tensor

from ..errors import MissingSplit, UserError
from .cache import cache_directory
from .cifar import find_cifar10
from .idx import find_fashion, find_idx
from .images import ImageData, MemoryImages

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
TIMEOUT = 20.0  # seconds without an answer until a download counts as failed


class ClassFiles(Protocol):
    """The files of a data set on disk: its classes in label order, and its splits."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    def read(self, split: str) -> tuple[Tensor, tuple[int, ...]]:
        """Pictures uint8 (N, 3, 32, 32) and N labels of "train" or "test"."""
        ...


@dataclass(frozen=True)
class Named:
    """Where a data set is looked for.

    find         its files in a folder, None without any
    torchvision  the class of torchvision.datasets that fetches it
    size         of the download
    installed    the folder of its Debian package
    install      the command that makes that folder
    """

    find: Callable[[Path], ClassFiles | None]
    torchvision: str
    size: str
    installed: Path | None = None
    install: str | None = None


NAMED = {
    "fashion-mnist": Named(
        find_fashion,
        "FashionMNIST",
        "31 MB",
        Path("/usr/share/datasets/fashion-mnist"),
        "apt install dataset-fashion-mnist",
    ),
    "cifar10": Named(find_cifar10, "CIFAR10", "170 MB"),
}


def load_named(
    name: str, *, split: str, resolution: int, caption_column: str | None, center_crop: bool
) -> ImageData:
    """One split, "train" or "test", of "fashion-mnist" or "cifar10"; where it is not here, it is fetched.

    caption_column  "text" or "label" for the name of the class, None for no captions
    """
    files = find_named(name) or _fetch(name)
    return _labelled(name, files, split, resolution, caption_column, center_crop)


def load_class_folder(
    folder: Path, *, split: str, resolution: int, caption_column: str | None, center_crop: bool
) -> ImageData | None:
    """The data set whose IDX files (idx.py) or CIFAR-10 batches (cifar.py) a folder holds; None without any."""
    files = find_idx(folder) or find_cifar10(folder)
    if files is None:
        return None
    return _labelled(str(folder), files, split, resolution, caption_column, center_crop)


def find_named(name: str) -> ClassFiles | None:
    """The files of a named data set on this machine: in $FEWSTEP_DATA/<name>, its Debian package, or the cache.

    Raises UserError when $FEWSTEP_DATA is no folder, or its <name> holds other things.
    """
    source, chosen = NAMED[name], os.environ.get("FEWSTEP_DATA")
    if chosen:
        own = Path(chosen).expanduser()
        if not own.is_dir():
            raise UserError(f"FEWSTEP_DATA: {own} is no folder: make it or unset the variable")
        if (own / name).is_dir():
            files = source.find(own / name)
            if files is None:
                raise UserError(
                    f"{own / name}: holds no files of {name}: put them there or remove the folder"
                )
            return files
    places = [folder for folder in (source.installed, _cached(name)) if folder]
    return next(filter(None, map(source.find, places)), None)


def _labelled(
    name: str,
    files: ClassFiles,
    split: str,
    resolution: int,
    caption_column: str | None,
    center_crop: bool,
) -> ImageData:
    if split not in SPLITS:
        raise MissingSplit(f"{name}: has no split {split!r}: choose one of {', '.join(SPLITS)}")
    if caption_column not in ("text", "label", None):
        raise UserError(f"{name}: has no caption column {caption_column!r}: choose text or label, or null")
    pixels, labels = files.read(split)
    names = [files.classes[label] for label in labels]
    return MemoryImages(
        pixels,
        [""] * len(names) if caption_column is None else names,
        [{"category": name} for name in names],
        resolution=resolution,
        center_crop=center_crop,
        classes=files.classes,
        name=name,
    )


def _cached(name: str) -> Path:
    return cache_directory() / "data" / name


def _fetch(name: str) -> ClassFiles:
    """Fetched by torchvision, which checks the MD5, into the cache: all of the files or no folder at all."""
    source, folder = NAMED[name], _cached(name)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(_missing(name, "HF_HUB_OFFLINE forbids to fetch it"))
    from torchvision import datasets

    part = folder.with_name(f"{name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")), _timeout():
            if not folder.is_dir():
                log.warning("%s: not on this machine: fetching %s into %s", name, source.size, folder)
                shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
                try:
                    getattr(datasets, source.torchvision)(part, download=True)
                    part.replace(folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(_missing(name, f"it cannot be fetched ({reason})")) from error
    files = source.find(folder)
    if files is None:
        raise UserError(f"{folder}: holds no files of {name}: remove it, and it is fetched again")
    return files


def _missing(name: str, reason: str) -> str:
    install = NAMED[name].install
    remedies = [install] if install else []
    remedies += [f"put its files into $FEWSTEP_DATA/{name}", "give the path of their folder as data.name"]
    return f"{name}: is not on this machine, and {reason}: {', or '.join(remedies)}"


@contextmanager
def _timeout() -> Iterator[None]:
    """torchvision sets none, so a silent server would hold the run for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
