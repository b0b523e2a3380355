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

from ..errors import UserError
from .cache import cache_directory
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
    installed    the folder of its Debian package
    install      the command that makes that folder
    """

    find: Callable[[Path], ClassFiles | None]
    torchvision: str
    installed: Path | None = None
    install: str | None = None


NAMED = {
    "fashion-mnist": Named(
        find_fashion,
        "FashionMNIST",
        Path("/usr/share/datasets/fashion-mnist"),
        "apt install dataset-fashion-mnist",
    ),
}


def load_named(
    name: str, *, split: str, resolution: int, caption_column: str | None, center_crop: bool
) -> ImageData:
    """ "fashion-mnist" from $FEWSTEP_DATA/<name>, its Debian package, the cache or the network.

    caption_column  "text" or "label" for the name of the class, None for no captions
    """
    return _labelled(name, locate(name), split, resolution, caption_column, center_crop)


def load_class_folder(
    folder: Path, *, split: str, resolution: int, caption_column: str | None, center_crop: bool
) -> ImageData | None:
    """The data set whose IDX files a folder holds (idx.py); None if it does not."""
    files = find_idx(folder)
    return files and _labelled(str(folder), files, split, resolution, caption_column, center_crop)


def locate(name: str) -> ClassFiles:
    """The files of a named data set, fetched if need be. UserError when they are nowhere to be had."""
    source = NAMED[name]
    chosen = os.environ.get("FEWSTEP_DATA")
    own = Path(chosen).expanduser() / name if chosen else None
    places = [own, source.installed, cache_directory() / "data" / name]
    for folder in places:
        files = source.find(folder) if folder and folder.is_dir() else None
        if files:
            return files
        if folder and folder == own and folder.is_dir():
            raise UserError(f"{folder}: holds no files of {name}: put them there or unset FEWSTEP_DATA")
    files = source.find(_fetch(name, source))
    assert files is not None
    return files


def _labelled(
    name: str,
    files: ClassFiles,
    split: str,
    resolution: int,
    caption_column: str | None,
    center_crop: bool,
) -> ImageData:
    if split not in SPLITS:
        raise UserError(f"{name}: has no split {split!r}: choose one of {', '.join(SPLITS)}")
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


def _fetch(name: str, source: Named) -> Path:
    """The folder in the cache into which torchvision fetched the files: all of them, or there is no folder."""
    folder = cache_directory() / "data" / name
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(_missing(name, source, "HF_HUB_OFFLINE forbids to fetch it"))
    import torchvision

    part = folder.with_name(f"{name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")), _timeout():
            if not folder.is_dir():
                log.warning("%s: not on this machine: fetching it into %s", name, folder)
                shutil.rmtree(part, ignore_errors=True)
                getattr(torchvision.datasets, source.torchvision)(part, download=True)
                part.replace(folder)
    except (OSError, RuntimeError, HTTPException) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = " ".join(str(error).split())[:160]
        raise UserError(_missing(name, source, f"it cannot be fetched ({reason})")) from error
    return folder


def _missing(name: str, source: Named, reason: str) -> str:
    remedies = [source.install] if source.install else []
    remedies += [
        f"put its files into {name}/ in a folder that FEWSTEP_DATA names",
        "give their folder as name",
    ]
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
