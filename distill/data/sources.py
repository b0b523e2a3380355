"""A data set by name: embedded, a folder or shards on disk, or an id on the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from ..errors import MissingSplit, UserError
from .embedded import load_emoji
from .folders import open_folder, say
from .images import ImageData, TableImages
from .named import NAMED, load_class_folder, load_named
from .names import STYLES
from .shards import match_shards, open_shards
from .tables import Table, no_captions, open_hub


def other_split(name: str, split: str) -> str:
    """The pictures beside `split` that a comparison with unseen ones takes by default."""
    if name in NAMED:
        return "train" if split == "test" else "test"
    return "holdout"


def load_data(
    name: str,
    *,
    split: str = "train",
    resolution: int,
    caption_column: str | None = "text",
    image_column: str = "image",
    center_crop: bool = True,
) -> ImageData:
    """Captioned images, resized and cut to `resolution` x `resolution`, RGB over white.

    name            "emoji", "emoji-noto", "emoji-twemoji"; "fashion-mnist", "cifar10" (named.py says where they
                    are looked for); else a folder of IDX files, of CIFAR-10's batches, of images, of
                    webdataset shards or of parquet files; else a shard or a pattern such as
                    "shards/{000..099}.tar"; else an id on the Hub. Captions of a folder of images stand in
                    metadata.jsonl, .csv or .parquet (images that it does not list are left out), else in a NAME.txt
                    beside each NAME.png; subfolders of a folder without metadata are its classes
    split           a folder's splits are its subfolders (train, holdout, ...); without any it is all "train"
    caption_column  where the captions are; a column of class labels gives the class names. None: no captions.
                    Shards have them in their .txt files, or under this key in their .json files
    image_column    where the images are in a table; in shards the one image file of a sample is found anyway
    center_crop     False squeezes the whole picture into the square instead

    A row without a caption has ""; where others have one, a line says how many. Raises UserError for whatever cannot
    be found or read.
    """
    if resolution < 1:
        raise UserError(f"resolution: {resolution} is no size in pixels: give a positive number")
    path = Path(name).expanduser()
    how: Any = dict(
        split=split, resolution=resolution, caption_column=caption_column, center_crop=center_crop
    )
    known = None
    if name in STYLES:
        known = load_emoji(name, **how)
    elif name in NAMED:
        known = load_named(name, **how)
    elif path.is_dir():
        known = load_class_folder(path, **how)
    if known is not None:
        if image_column != "image":
            raise UserError(f"{name}: has no image column {image_column!r}: set image_column to image")
        return known
    if path.is_dir():
        table = open_folder(path, split, image_column)
    elif path.is_file() or re.search(r"[*?\[{]", name):
        if split != "train":
            raise MissingSplit(
                f"{name}: a pattern is all of split 'train': name the shards of {split!r} by one of their own"
            )
        table = open_shards(match_shards(name), name, image_column)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        table = open_hub(name, split, image_column)
    else:
        raise UserError(
            f"{name}: no such folder: give a folder of images, tar shards or a data set id of the Hub"
        )
    if not len(table.cells):
        raise UserError(f"{name}: split {split!r} has no rows: put images in it")
    data = TableImages(
        table.cells,
        _captions(table, caption_column),
        table.rows,
        resolution=resolution,
        center_crop=center_crop,
        classes=table.classes,
        name=name,
    )
    if caption_column is not None and 0 < len(data.uncaptioned) < len(data):
        say(
            f"{name}: {len(data.uncaptioned)} of {len(data)} pictures have no caption and get the empty one, the first "
            f"{data.called(data.uncaptioned[0])}"
        )
    return data


def _captions(table: Table, caption_column: str | None) -> list[str]:
    """N captions, "" for a row without one."""
    if caption_column is None or (caption_column == "text" and not table.expected):
        return [""] * len(table.cells)
    if caption_column not in table.columns:
        there = [c for c in table.columns if not c.startswith("__")]
        raise UserError(no_captions(table.where, caption_column, there))
    values = table.columns[caption_column]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{table.where}: caption of row {i} is {str(value)[:40]} ({type(value).__name__}), not text: "
                f"set caption_column to another than {caption_column!r}"
            )
        if value is not None and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{table.where}: caption of row {i} holds half a character (a surrogate): mend it"
            )
    return [value or "" for value in values]
