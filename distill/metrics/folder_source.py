"""Pictures from a folder of image files."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import read_picture
from ..errors import UserError
from .inputs import Inputs
from .source import Source, hash_files, short, side

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class FolderSource(Source):
    """The image files of a folder in the order of their names, taken as they are."""

    seed_rule = "files of a folder"

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(
                f"{folder}: holds neither a pipeline (model_index.json) nor images; give another folder"
            )
        formats = sorted({p.suffix.lower().lstrip(".") for p in self.files})
        self.quantisation = f"uint8, image files ({', '.join(formats)})"

    def calls(
        self, steps: Sequence[int], seeds: int, guidance_scale: float | None, num_images: int
    ) -> dict[int | None, dict[str, Any]]:
        for name, idle in (
            ("steps", not steps),
            ("seeds", seeds == 1),
            ("guidance_scale", guidance_scale is None),
        ):
            if not idle:
                raise UserError(f"{name}: has no effect on a folder of images ({self.folder}); leave it out")
        if num_images > len(self.files):
            raise UserError(
                f"num_images: {num_images} wanted, {self.folder} holds {len(self.files)} images; lower it"
            )
        return {None: {}}

    def pictures(
        self,
        rows: range,
        inputs: Inputs,
        seed_block: int,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, float]:
        """The files at `rows`; UserError if one is unreadable or not as large as the first."""
        start = time.perf_counter()
        first = read_image(self.files[0])
        side(str(self.files[0]), first[None])
        pictures = [read_image(self.files[i]) for i in rows]
        for i, picture in zip(rows, pictures, strict=True):
            if picture.shape != first.shape:
                is_, others = (f"{s[2]}x{s[1]}" for s in (picture.shape, first.shape))
                raise UserError(
                    f"{self.files[i]}: {is_} pixels, the first has {others}; make all of one size"
                )
        return torch.stack(pictures), time.perf_counter() - start

    def quantise_by(self, rule: Callable[[Tensor], Tensor], name: str) -> None:
        pass

    def identity(self) -> str:
        return hash_files(self.folder, self.files)

    def describe(self) -> dict[str, Any]:
        return {"pipeline": short(self.folder), "pipeline_sha256": self.identity()}


def read_image(path: Path) -> Tensor:
    """An image file as uint8 (3, H, W), transparency on white. Raises UserError if it cannot be read."""
    return torch.from_numpy(np.array(read_picture(path, str(path)))).permute(2, 0, 1)
