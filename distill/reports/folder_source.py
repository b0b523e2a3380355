"""Pictures from a folder of image files, read as a data set is."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.images import PICTURE_SUFFIXES
from ..data.sources import load_data
from ..data.tables import SPLIT_FOLDERS
from ..errors import UserError
from ..metrics.reference import ORDER_SEED, in_order
from ..metrics.squares import squares_of
from .inputs import Inputs
from .source import Source, short

log = logging.getLogger(__name__)


class FolderSource(Source):
    """The pictures that `load_data` finds in a folder, of its split "train" where it has splits.

    Every picture is cut to a square as the reference is (`center_crop` of load_data), with the side of the smallest
    one. Picture i is that of row i in the fixed random order that the rows of a reference have too, so that the first
    of them are a fair sample of any size.
    """

    seed_rule = f"files of a folder in a fixed random order (seed {ORDER_SEED})"

    def __init__(self, folder: Path, center_crop: bool = True):
        self.folder = folder
        if not any(p.suffix.lower() in PICTURE_SUFFIXES for p in folder.rglob("*")):
            raise UserError(
                f"{folder}: holds neither a pipeline (model_index.json) nor images; give another folder"
            )
        splits = [name for name in SPLIT_FOLDERS if (folder / name).is_dir()]
        if splits and "train" not in splits:
            raise UserError(f"{folder}: holds the splits {', '.join(splits)}; give {folder / splits[0]}")
        self.shown = folder / "train" if splits else folder
        how: dict[str, Any] = {"caption_column": None, "center_crop": center_crop}
        squares = squares_of(load_data(str(folder), resolution=1, **how))
        self.data, self.order = in_order(str(folder), "train", squares.side, how)
        self.touched = squares.touched
        self.quantisation = f"uint8, image files ({', '.join(squares.suffixes)})"
        if squares.cut:
            self.quantisation += f"; {squares.cut}"
        if squares.largest != squares.side:
            self.quantisation += f"; resized to {squares.side} px, bicubic antialiased"
            log.warning(
                "%s: squares of %d to %d pixels: all are resized to %d, the side of %s",
                folder, squares.side, squares.largest, squares.side, squares.smallest,
            )  # fmt: skip

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
        if num_images > len(self.order):
            raise UserError(
                f"num_images: {num_images} wanted, {self.folder} holds {len(self.order)} images; lower it"
            )
        return {None: {}}

    def pictures(
        self,
        rows: range,
        inputs: Inputs,
        seed_block: int,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, float]:
        """Those of `rows`, from the start again after the last; UserError if one is unreadable."""
        start = time.perf_counter()
        return self.data.images(self.inputs_of(rows)), time.perf_counter() - start

    def inputs_of(self, rows: range) -> list[int]:
        return [self.order[i % len(self.order)] for i in rows]

    def quantise_by(self, rule: Callable[[Tensor], Tensor], name: str) -> None:
        pass

    def identity(self) -> str:
        return self.data.fingerprint

    def describe(self) -> dict[str, Any]:
        return {"pipeline": short(self.shown), "pipeline_sha256": self.identity()}
