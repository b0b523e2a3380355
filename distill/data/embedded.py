"""The embedded captioned emoji in two styles, built by scripts/build_emoji.py (sources: emoji/NOTICE.md)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import MissingSplit, UserError
from .images import ImageData, MemoryImages
from .names import STYLES

FOLDER = Path(__file__).parent / "emoji"
CELL, COLUMNS = 32, 40
SPLITS = ("train", "reward", "score", "holdout")


def load_emoji(
    name: str, *, split: str, resolution: int, caption_column: str | None, center_crop: bool
) -> ImageData:
    """One split of "emoji-noto", "emoji-twemoji", or "emoji": all Noto rows, then the same names in Twemoji.

    caption_column  "text" (the name), "category" or "subcategory"; None leaves the captions empty
    """
    if split not in SPLITS:
        raise MissingSplit(f"{name}: has no split {split!r}: choose one of {', '.join(SPLITS)}")
    columns = {"text": "caption", "category": "category", "subcategory": "subcategory"}
    if caption_column is not None and caption_column not in columns:
        raise UserError(
            f"{name}: has no caption column {caption_column!r}: choose one of {', '.join(columns)}"
        )
    kept = [i for i, entry in enumerate(entries()) if entry["split"] == split]
    captions, rows = [], []
    for style in STYLES[name]:
        for i in kept:
            entry = entries()[i]
            captions.append("" if caption_column is None else entry[columns[caption_column]])
            rows.append({k: entry[k] for k in ("category", "subcategory", "unified")} | {"style": style})
    pixels = torch.cat([cells(style)[kept] for style in STYLES[name]])
    return MemoryImages(
        pixels,
        captions,
        rows,
        resolution=resolution,
        center_crop=center_crop,
        classes=tuple(sorted({entry["category"] for entry in entries()})),
        name=name,
    )


@cache
def entries() -> list[dict[str, str]]:
    """One dict per emoji in the order of the sheets: unified, caption, category, subcategory, split."""
    with open(FOLDER / "metadata.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@cache
def cells(style: str) -> Tensor:
    """Every emoji of a style in the order of `entries`, uint8 (1636, 3, 32, 32)."""
    sheet = np.asarray(Image.open(FOLDER / f"{style}.png").convert("RGB"))
    grid = sheet.reshape(-1, CELL, COLUMNS, CELL, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, CELL, CELL)
    return torch.from_numpy(grid[: len(entries())].copy())
