"""A data set by name: embedded, a folder or shards on disk, or an id on the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from .embedded import STYLES, load_emoji
from .images import ImageData, TableImages
from .named import NAMED, load_class_folder, load_named
from .tables import no_captions, open_folder, open_hub, open_shards


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
                    are looked for); else a folder of IDX files, of CIFAR-10's batches, of images (with
                    metadata.jsonl for captions; images that it does not list are left out), of webdataset
                    shards or of parquet files; else a shard or a pattern such as "shards/{000..099}.tar";
                    else an id on the Hub
    split           a folder's splits are its subfolders (train, holdout, ...); without any it is all "train"
    caption_column  where the captions are; a column of class labels gives the class names. None: no captions.
                    Shards have them in their .txt files, or under this key in their .json files
    image_column    where the images are in a table; in shards the one image file of a sample is found anyway
    center_crop     False squeezes the whole picture into the square instead

    Raises UserError for whatever cannot be found or read.
    """
    if resolution < 1:
        raise UserError(f"resolution: {resolution} is no size in pixels: give a positive number")
    path, captions_expected = Path(name).expanduser(), True
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
        table, captions_expected = open_folder(path, split, caption_column)
    elif path.is_file() or re.search(r"[*?\[{]", name):
        table = open_shards(name, split)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        table = open_hub(name, split)
    else:
        raise UserError(
            f"{name}: no such folder: give a folder of images, tar shards or a data set id of the Hub"
        )
    if not len(table):
        raise UserError(f"{name}: split {split!r} has no rows: put images in it")
    table = _with_image_column(name, table, image_column)
    if caption_column is None or (caption_column == "text" and not captions_expected):
        captions = [""] * len(table)
    else:
        captions = _captions(name, table, caption_column)
    kept = [c for c in ("image", "__url__") if c in table.column_names]
    return TableImages(
        table.select_columns(kept),
        captions,
        _rows(table),
        resolution=resolution,
        center_crop=center_crop,
        classes=_classes(table),
        name=name,
    )


def _with_image_column(name: str, table: Any, image_column: str) -> Any:
    """The table with its images, not decoded, under "image"."""
    import datasets

    found = [c for c, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if image_column not in found:
        if "__key__" not in table.features or len(found) != 1 or image_column != "image":
            raise UserError(
                f"{name}: has no image column {image_column!r}: set image_column to one of "
                f"{', '.join(found or table.column_names)}"
            )
        image_column = found[0]
    if image_column != "image":
        table = table.remove_columns([c for c in ("image",) if c in table.column_names])
        table = table.rename_column(image_column, "image")
    return table.cast_column("image", datasets.Image(decode=False))


def _captions(name: str, table: Any, caption_column: str) -> list[str]:
    import datasets

    features, key = table.features, None
    column = caption_column
    if column not in features and "__key__" in features:
        if column == "text" and "txt" in features:
            column = "txt"
        elif isinstance(features.get("json"), dict) and column in features["json"]:
            column, key = "json", column
    if column not in features:
        inside = features["json"] if isinstance(features.get("json"), dict) else ()
        raise UserError(
            no_captions(name, column, [c for c in features if c[:2] != "__" and c != "image"] + [*inside])
        )
    values = table.select_columns(column)[:][column]
    if key is not None:
        values = [None if value is None else value[key] for value in values]
    if isinstance(features[column], datasets.ClassLabel):
        values = [_class_name(features[column], value) for value in values]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{name}: caption of row {i} is {str(value)[:40]} ({type(value).__name__}), not text: "
                f"set caption_column to another than {caption_column!r}"
            )
    return [value or "" for value in values]


def _rows(table: Any) -> list[dict[str, str]]:
    """category, subcategory and style where the table has them; the class in "label" is the category."""
    import datasets

    out: list[dict[str, str]] = [{} for _ in range(len(table))]
    for column, feature in sorted(table.features.items(), key=lambda item: item[0] == "label"):
        label = column == "label" and isinstance(feature, datasets.ClassLabel)
        text = column in ("category", "subcategory", "style") and feature == datasets.Value("string")
        if label or text:
            for row, value in zip(out, table.select_columns(column)[:][column], strict=True):
                known = _class_name(feature, value) if label else value
                if known is not None:
                    row["category" if label else column] = known
    return out


def _classes(table: Any) -> tuple[str, ...]:
    """The names in a column "label" of class labels, empty without one."""
    import datasets

    feature = table.features.get("label")
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _class_name(feature: Any, value: int | None) -> str | None:
    """`datasets` writes -1 for a row without a class."""
    return None if value is None or value < 0 else feature.int2str(value)
