"""Pictures out of the archives that references are published in, and the crop before the extractor."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Crop:
    """What is done to a picture, real or generated, before the extractor's own resize.

    square  cut the centre of the shorter side's size (torchvision's center_crop)
    side    then resize to side x side by Pillow's Lanczos on uint8; None leaves the size
    """

    square: bool = False
    side: int | None = None

    def __str__(self) -> str:
        parts = ["centre crop to square"] if self.square else []
        parts += [f"Lanczos to {self.side} px, uint8"] if self.side else []
        return ", ".join(parts) or "none"

    def picture(self, image: Image.Image) -> Image.Image:
        """The RGB picture under this rule."""
        image = image.convert("RGB")
        if self.square:
            side = min(image.size)
            left, top = (round((length - side) / 2.0) for length in image.size)
            image = image.crop((left, top, left + side, top + side))
        if self.side is not None and image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
        return image

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> uint8 (N, 3, h, w), on the CPU unless there is nothing to do."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if not self.square and self.side is None:
            return images
        planes = images.cpu().permute(0, 2, 3, 1).numpy()
        return torch.stack([to_tensor(self.picture(Image.fromarray(p))) for p in planes])


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def zip_pictures(path: Path, choose: Callable[[list[str]], list[str]], crop: Crop) -> Iterator[Tensor]:
    """Cropped pictures uint8 (3, H, W) of a zip archive or a folder; `choose` picks and orders their names.

    Raises UserError if it is neither, holds nothing that `choose` picks, or a picture cannot be read.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if _is_picture(p.name))
        for name in _chosen(path, choose, names):
            yield _read(path, name, (path / name).read_bytes(), crop)
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: neither a folder of pictures nor a zip archive ({error})") from None
    with archive:
        names = sorted(n for n in archive.namelist() if _is_picture(n))
        for name in _chosen(path, choose, names):
            yield _read(path, name, archive.read(name), crop)


def all_pictures(pattern: str = "*") -> Callable[[list[str]], list[str]]:
    """Names that match, in alphabetical order."""
    return lambda names: [name for name in names if fnmatch(name, pattern)]


def npz_pictures(path: Path, key: str = "arr_0") -> Iterator[Tensor]:
    """uint8 (3, H, W) from an array (N, H, W, 3) in an .npz file, row by row: 50,000 pictures need no 10 GB."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise UserError(f"{path}: {key} is {dtype} {shape}, not uint8 (N, H, W, 3)")
            row = shape[1] * shape[2] * 3
            for _ in range(shape[0]):
                pixels = np.frombuffer(file.read(row), np.uint8).reshape(shape[1:]).copy()
                yield torch.from_numpy(pixels).permute(2, 0, 1)
    except (OSError, KeyError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path}: no pictures {key} ({error}); prepare it again") from None


def cifar10_pictures(path: Path, split: str, count: int) -> Iterator[Tensor]:
    """The first `count` pictures uint8 (3, 32, 32) of "train" or "test" in cifar-10-python.tar.gz, as stored.

    The batches are pickles: give only an archive whose hash was checked.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    left = count
    try:
        with tarfile.open(path) as archive:
            for name in names:
                file = archive.extractfile(f"cifar-10-batches-py/{name}")
                assert file is not None
                rows = pickle.loads(file.read(), encoding="bytes")[b"data"][:left]
                yield from torch.from_numpy(rows.copy()).view(-1, 3, 32, 32)
                left -= len(rows)
                if left == 0:
                    return
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{path}: not the CIFAR-10 archive ({error}); prepare it again") from None
    raise UserError(f"{path}: {split} has {count - left} pictures, not {count}")


def batches(pictures: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Pictures (3, H, W) in their order as batches (B, 3, H, W), B <= size, of one shape each."""
    held: list[Tensor] = []
    for picture in pictures:
        if held and (len(held) == size or held[0].shape != picture.shape):
            yield torch.stack(held)
            held = []
        held.append(picture)
    if held:
        yield torch.stack(held)


def _is_picture(name: str) -> bool:
    """By its ending; what macOS adds to archives is none."""
    return Path(name).suffix.lower() in PICTURES and not Path(name).name.startswith("._")


def _chosen(path: Path, choose: Callable[[list[str]], list[str]], names: list[str]) -> list[str]:
    chosen = choose(names)
    if not chosen:
        raise UserError(f"{path}: has none of the pictures that are wanted, among {len(names)}; give another")
    missing = set(chosen) - set(names)
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} of {len(chosen)} pictures, such as {min(missing)}")
    return chosen


def _read(path: Path, name: str, data: bytes, crop: Crop) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_tensor(crop.picture(image))
    except OSError as error:
        raise UserError(f"{path}: {name} is no readable picture ({error}); prepare it again") from None
