"""Pictures from a folder of image files."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import over_white
from ..errors import UserError
from .source import Source, first_line, hash_files, short, side

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class FolderSource(Source):
    """The image files of a folder in the order of their names, taken as they are."""

    seed_rule = "files of a folder"
    quantisation = "uint8, image files"

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(
                f"{folder}: holds neither a pipeline (model_index.json) nor images; give another folder"
            )

    def calls(
        self, steps: Sequence[int], seeds: int, guidance_scale: float | None
    ) -> dict[int | None, dict[str, Any]]:
        for name, idle in (
            ("steps", not steps),
            ("seeds", seeds == 1),
            ("guidance_scale", guidance_scale is None),
        ):
            if not idle:
                raise UserError(f"{name}: has no effect on a folder of images ({self.folder}); leave it out")
        return {None: {}}

    def warm_up(self, arguments: dict[str, Any], count: int) -> int:
        return side(str(self.files[0]), read_image(self.files[0])[None])

    def batches(
        self, prompts: Sequence[str], count: int, seed_block: int, arguments: dict[str, Any], batch_size: int
    ) -> Iterator[tuple[Tensor, float]]:
        """The first `count` files; UserError if there are fewer, one is unreadable or of another size."""
        if count > len(self.files):
            raise UserError(
                f"num_images: {count} wanted, {self.folder} holds {len(self.files)} images; lower it"
            )
        size = read_image(self.files[0]).shape
        for first in range(0, count, batch_size):
            start = time.perf_counter()
            files = self.files[first : min(first + batch_size, count)]
            pictures = [read_image(path) for path in files]
            for path, picture in zip(files, pictures, strict=True):
                if picture.shape != size:
                    is_, others = (f"{s[2]}x{s[1]}" for s in (picture.shape, size))
                    raise UserError(f"{path}: {is_} pixels, the first has {others}; make all of one size")
            yield torch.stack(pictures), time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        return {"pipeline": short(self.folder), "pipeline_sha256": hash_files(self.folder, self.files)}


def read_image(path: Path) -> Tensor:
    """An image file as uint8 (3, H, W), transparency on white. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            rgb = over_white(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable image ({first_line(error)}); mend or remove it") from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
