"""How the pictures of a data set become squares: what is scored and its reference are cut by the same rule."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from ..data.images import ImageData, TableImages
from ..errors import UserError, first_line


@dataclass(frozen=True)
class Squares:
    """The sizes of a data set's pictures.

    side, largest  pixels on a side of the smallest and of the largest centred square
    smallest       how messages call the picture with the smallest one
    cut            what makes squares of the pictures, as a Protocol says it; "" where all are square
    touched        the first picture that is not taken as its file is, and why; None without
    suffixes       endings of the files, without their dots
    """

    side: int
    largest: int
    smallest: str
    cut: str
    touched: str | None
    suffixes: tuple[str, ...] = ()


def squares_of(data: ImageData) -> Squares:
    """From the heads of the files; turns by EXIF are counted. Raises UserError for one that is no picture."""
    rule = "centre squares" if data.center_crop else "squeezed to squares"
    if not isinstance(data, TableImages):
        height, width = data.images([0]).shape[-2:]
        return Squares(min(height, width), min(height, width), data.called(0), "", None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        heads = list(pool.map(lambda i: _head(data, i), range(len(data))))
    sides = [min(width, height) for _, width, height, _ in heads]
    side = min(sides)
    touched = None
    for name, width, height, turned in heads:
        if turned or width != height or width != side:
            how = "turned by its EXIF tag" if turned else f"{width}x{height} pixels"
            touched = touched or f"{name}: {how}"
    return Squares(
        side,
        max(sides),
        heads[sides.index(side)][0],
        rule if any(width != height for _, width, height, _ in heads) else "",
        touched,
        tuple(sorted({Path(name).suffix.lower().lstrip(".") for name, *_ in heads})),
    )


def _head(data: TableImages, index: int) -> tuple[str, int, int, bool]:
    """Name, width, height and whether EXIF turns it, of a picture that is not decoded."""
    name, source = data.encoded(index)
    try:
        with Image.open(source) as image:
            tagged = "exif" in image.info or image.format in ("TIFF", "MPO")
            turned = tagged and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return name, *image.size, turned
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name}: cannot be read as an image ({first_line(error)}): mend or remove it"
        ) from error
