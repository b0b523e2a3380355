"""Captioned images held in memory or decoded row by row."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError

# Endings of files in lower case: those that are read as pictures, and pictures to the user that are not read.
PICTURE_SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".gif", ".icb", ".icns", ".ico", ".im",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".msp", ".pbm", ".pcd",
    ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga",
    ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm",
))  # fmt: skip
UNREAD_SUFFIXES = frozenset((
    ".ai", ".arw", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".exr", ".hdr", ".heic", ".heics", ".heif", ".heifs", ".hif",
    ".jls", ".jxl", ".jxr", ".kra", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".svg", ".svgz", ".wdp",
    ".wmf", ".xcf",
))  # fmt: skip

SIXTEEN_BITS = ("PNG", "PPM")  # formats whose grey of mode "I" spans 0 to 65535


class Cells(Protocol):
    """Encoded pictures: each {"image": {"path", "bytes"}}, one of them None, and perhaps "__url__", its shard."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ImageData(ABC):
    """N captioned images, all square with `resolution` pixels a side.

    captions  N strings, "" where there is none
    rows      N dicts with what else is known: category, subcategory, style, unified (code points)
    classes   names of the categories in label order; empty where the data set does not say
    name      how messages call the data set
    """

    def __init__(
        self,
        captions: list[str],
        rows: list[dict[str, str]],
        resolution: int,
        center_crop: bool,
        classes: tuple[str, ...] = (),
        name: str = "data",
    ):
        assert len(captions) == len(rows)
        self.captions = captions
        self.rows = rows
        self.resolution = resolution
        self.center_crop = center_crop
        self.classes = classes
        self.name = name

    def __len__(self) -> int:
        return len(self.captions)

    @abstractmethod
    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """Rows `indices`, by default all, as uint8 (n, 3, H, W). UserError names an unreadable file."""

    @abstractmethod
    def hash_content(self, digest: Any) -> None:
        """Feed what identifies the images, in order, to a hashlib object."""

    def called(self, index: int) -> str:
        """How messages call a row."""
        return f"row {index} of {self.name}"

    @cached_property
    def labels(self) -> list[int]:
        """The class of every row by its place in `classes`. UserError without classes or where a row has none."""
        if not self.classes:
            raise UserError(
                f"{self.name}: has no class labels: give a data set with classes, such as fashion-mnist, a folder "
                'with one subfolder per class, or a table with a ClassLabel column "label"'
            )
        places = {name: i for i, name in enumerate(self.classes)}
        labels = [places.get(row.get("category", "")) for row in self.rows]
        if None in labels:
            raise UserError(
                f"{self.called(labels.index(None))} has no class label, nor have {labels.count(None) - 1} other rows: "
                "give it one or remove it"
            )
        return [label for label in labels if label is not None]

    @cached_property
    def uncaptioned(self) -> list[int]:
        """The rows whose caption is blank."""
        return [i for i, caption in enumerate(self.captions) if not caption.strip()]

    def need_captions(self) -> None:
        """UserError where no row has a caption: for methods that are told prompts."""
        if len(self.uncaptioned) == len(self):
            named = "label for the names of the classes, or to " if self.classes else ""
            raise UserError(
                f"data.name: {self.name} has no captions, and this method trains on prompts: give a metadata.jsonl "
                '(lines with "file_name" and "text") or a NAME.txt beside each NAME.png, or set data.caption_column '
                f"to {named}null to train on empty prompts"
            )

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of captions, images and the way they are cut: equal in every process and run."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.resolution, self.center_crop, self.captions)).encode())
        self.hash_content(digest)
        return digest.hexdigest()


class MemoryImages(ImageData):
    """Images given as uint8 (N, 3, h, w); another `resolution` is made by bicubic resizing on the way out."""

    def __init__(
        self,
        pixels: Tensor,
        captions: list[str],
        rows: list[dict[str, str]],
        *,
        resolution: int,
        center_crop: bool = True,
        classes: tuple[str, ...] = (),
        name: str = "data",
    ):
        assert pixels.dtype == torch.uint8 and len(pixels) == len(captions)
        super().__init__(captions, rows, resolution, center_crop, classes, name)
        self.pixels = pixels

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        chosen = self.pixels if indices is None else self.pixels[torch.as_tensor(indices, dtype=torch.long)]
        if chosen.shape[-2:] == (self.resolution, self.resolution):
            return chosen.clone()
        pictures = (Image.fromarray(p.permute(1, 2, 0).numpy()) for p in chosen)
        return _stack([to_square(p, self.resolution, self.center_crop) for p in pictures], self.resolution)

    def hash_content(self, digest: Any) -> None:
        digest.update(repr(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().data)


class TableImages(ImageData):
    """Encoded images, decoded when they are asked for.

    The fingerprint reads every image whole.
    """

    def __init__(
        self,
        table: Cells,
        captions: list[str],
        rows: list[dict[str, str]],
        *,
        resolution: int,
        center_crop: bool = True,
        classes: tuple[str, ...] = (),
        name: str = "data",
    ):
        super().__init__(captions, rows, resolution, center_crop, classes, name)
        self.table = table

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        chosen = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return _stack(list(pool.map(self._decode, chosen)), self.resolution)

    def called(self, index: int) -> str:
        return self.encoded(index)[0]

    def encoded(self, index: int) -> tuple[str, str | io.BytesIO]:
        """How messages call the image of a row, and its path or its bytes."""
        return _name_and_source(self.table[index], index)

    def _decode(self, index: int) -> Image.Image:
        name, source = self.encoded(int(index))
        return to_square(read_picture(source, name), self.resolution, self.center_crop)

    def hash_content(self, digest: Any) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for content in pool.map(self._hashed, range(len(self))):
                digest.update(content)

    def _hashed(self, index: int) -> bytes:
        name, source = self.encoded(index)
        try:
            with open(source, "rb") if isinstance(source, str) else source as f:
                return hashlib.file_digest(f, "sha256").digest()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}): mend or remove it") from error


def read_picture(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """A picture file as 8-bit RGB, turned as its camera says, what is transparent over white.

    Raises UserError that calls it `name` where it cannot be read or its values do not span 0 to 255 by their type.
    """
    try:
        with Image.open(source) as image:
            image.load()
            turned = ImageOps.exif_transpose(eight_bits(image))
            assert turned is not None  # which some of Pillow's stubs allow
            rgb = over_white(turned)
        if np.asarray(rgb).max() == 1:
            raise ValueError("it holds only 0 and 1 of 0 to 255, like a mask; multiply by 255")
        return rgb
    except Exception as error:  # a decoder of damaged files raises nearly anything
        reason = "no image in this format" if "cannot identify" in str(error) else _first_line(error)
        raise UserError(f"{name}: cannot be read as an image ({reason}): mend or remove it") from error


def to_square(image: Image.Image, resolution: int, center_crop: bool) -> Image.Image:
    """RGB over white, `resolution` pixels a side, by antialiased bicubic resizing.

    center_crop  True: of the largest centred square. False: of the whole picture, squeezed into the square.
    """
    image = over_white(image)
    width, height = image.size
    side_x, side_y = (min(width, height),) * 2 if center_crop else (width, height)
    left, top = (width - side_x) / 2, (height - side_y) / 2
    box = (left, top, left + side_x, top + side_y)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def over_white(image: Image.Image) -> Image.Image:
    """8-bit RGB; what is transparent becomes white. Raises ValueError as `eight_bits`."""
    image = eight_bits(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(colours)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as the nearest of 8, 257 to one; other pictures as they are.

    Raises ValueError for grey of 32 bits, whose white nobody knows, and for 8 bits kept in 16.
    """
    if image.mode in ("I", "F") and image.format not in SIXTEEN_BITS:
        kind = "floating point" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"{kind} pixels, whose white is not known; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if 0 < values.max() <= 255:
        raise ValueError(f"16-bit pixels that end at {values.max()} of 65535; save it with 8 bits")
    out = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    out.info = {k: v for k, v in image.info.items() if k != "transparency"}
    clear = image.info.get("transparency")
    if clear is not None:
        out.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return out


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _stack(pictures: Sequence[Image.Image], resolution: int) -> Tensor:
    out = torch.empty(len(pictures), 3, resolution, resolution, dtype=torch.uint8)
    for row, picture in zip(out, pictures, strict=True):
        row.copy_(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return out


def _name_and_source(cell: dict[str, Any], index: int) -> tuple[str, str | io.BytesIO]:
    """How to call an image in a message, and its path or its bytes."""
    image = cell["image"] or {"path": None, "bytes": None}
    name = ": ".join(part for part in (cell.get("__url__"), image["path"]) if part) or f"row {index}"
    if image["bytes"] is None and image["path"] is None:
        raise UserError(f"{name}: row {index} has no image: mend or remove it")
    return name, image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
