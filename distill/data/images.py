"""Captioned images held in memory or decoded row by row."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError

PICTURE_SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .cur .dcx .dds .dib .gif .icb .icns .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf "
    ".jpg .jpx .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb .rgba .sgi .bw .tga .tif "
    ".tiff .vda .vst .webp .xbm .xpm".split()
)  # of files that are read as pictures, in lower case
UNREAD_SUFFIXES = frozenset(
    ".ai .arw .cr2 .cr3 .dng .emf .eps .exr .hdr .heic .heics .heif .heifs .hif .jls .jxl .jxr .kra .nef .orf .pef "
    ".raf .raw .rw2 .srw .svg .svgz .wdp .wmf .xcf".split()
)  # of files that are pictures to the user and cannot be read


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
                f"{self.name}: row {labels.index(None)} has no class label: give it one or remove it"
            )
        return [label for label in labels if label is not None]

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
    """Encoded images in one column of a map-style `datasets.Dataset`, decoded when they are asked for.

    `table` has the columns "image" ({"path", "bytes"}, not decoded) and perhaps "__url__" (the shard).
    The fingerprint reads every image whole.
    """

    def __init__(
        self,
        table: Any,
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

    def _decode(self, index: int) -> Image.Image:
        cell = self.table[int(index)]
        name, source = _name_and_source(cell, int(index))
        try:
            with Image.open(source) as image:
                image.load()
                return to_square(ImageOps.exif_transpose(image), self.resolution, self.center_crop)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "no image in this format" if "cannot identify" in str(error) else error
            raise UserError(f"{name}: cannot be read as an image ({reason}): mend or remove it") from error

    def hash_content(self, digest: Any) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for content in pool.map(self._hashed, range(len(self))):
                digest.update(content)

    def called(self, index: int) -> str:
        return self.encoded(index)[0]

    def encoded(self, index: int) -> tuple[str, str | io.BytesIO]:
        """How messages call the image of a row, and its path or its bytes."""
        return _name_and_source(self.table[index], index)

    def _hashed(self, index: int) -> bytes:
        name, source = self.encoded(index)
        try:
            with open(source, "rb") if isinstance(source, str) else source as f:
                return hashlib.file_digest(f, "sha256").digest()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}): mend or remove it") from error


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
    """8-bit RGB; what is transparent becomes white, and 16-bit grey keeps its high byte."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(colours)
    return image.convert("RGB")


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
