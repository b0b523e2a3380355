"""Folders of pictures: with metadata files, with a NAME.txt beside each, with a subfolder for each class, or plain."""

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import MissingSplit, UserError
from ..readers import parse_json, read_text
from .images import PICTURE_SUFFIXES, UNREAD_SUFFIXES
from .shards import open_shards
from .tables import SPLIT_FOLDERS, Table, open_parquet, rows_of

log = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OTHER_SUFFIXES = (
    ".tar",
    ".parquet",
    ".zip",
)  # of files that hold pictures and are not looked into beside pictures


class Files:
    """Pictures by their paths."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": {"path": self.files[index], "bytes": None}}


def open_folder(folder: Path, split: str, image_column: str) -> Table:
    """The pictures of a folder's split, in the order of their paths, or in that of its metadata files.

    Raises UserError for what cannot be read or would be left out in part.
    """
    root = _split_folder(folder, split)
    if root != folder and any((folder / m).exists() for m in METADATA_FILES):
        raise UserError(
            f"{folder}: its metadata lies beside the split folders: put one metadata.jsonl into {root}, "
            "with file names relative to it"
        )
    files = sorted(_walk(str(root)))
    pictures = [f for f in files if _suffix(f) in PICTURE_SUFFIXES]
    unread = [f for f in files if _suffix(f) in UNREAD_SUFFIXES]
    metadata = [f for f in files if os.path.basename(f) in METADATA_FILES]
    kinds = sorted({os.path.basename(f) for f in metadata})
    if len(kinds) > 1:
        raise UserError(f"{root}: has {' and '.join(kinds)}: keep one of them")
    if metadata and pictures + unread:
        return _described(root, metadata, sorted(pictures + unread), image_column)
    if pictures or unread:
        if image_column != "image":
            raise UserError(f"{root}: has no image column {image_column!r}: set image_column to image")
        _check_read(root, unread, len(pictures + unread))
        _tell_others(root, files)
        return _plain(root, pictures, set(files))
    for suffix in (".tar", ".parquet"):
        found = [f for f in files if _suffix(f) == suffix]
        if found and suffix == ".tar":
            return open_shards(found, str(root), image_column)
        if found:
            return open_parquet(str(root), found, image_column)
    raise UserError(
        f"{root}: holds no images, .tar shards or .parquet files: put some in or give another folder"
    )


def _split_folder(folder: Path, split: str) -> Path:
    there = [s for s in SPLIT_FOLDERS if (folder / s).is_dir()]
    if (folder / split).is_dir():
        beside = sorted(
            p.name for p in folder.iterdir() if p.name not in (*SPLIT_FOLDERS, split) and p.name[0] != "."
        )
        beside = [n for n in beside if (folder / n).is_dir() or _suffix(n) in PICTURE_SUFFIXES]
        if beside:
            say(
                f"{folder}: only {folder / split} is the split {split!r}; {len(beside)} folders and pictures beside "
                f"it are left out, the first {beside[0]}"
            )
        return folder / split
    if there:
        raise MissingSplit(
            f"{folder}: has no split {split!r}, only {', '.join(there)}: put its files into {folder / split}"
        )
    if split != "train":
        raise MissingSplit(
            f"{folder}: has no split {split!r}: move those files into {folder / split}, the others into "
            f"{folder / 'train'}, each with its own metadata.jsonl"
        )
    return folder


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder, but for hidden ones; links are followed, not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): mend or remove it") from error
    for entry in entries:
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        else:
            yield entry.path


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _check_read(root: Path | str, unread: list[str], count: int) -> None:
    if unread:
        kinds = ", ".join(sorted({_suffix(f) for f in unread}))
        raise UserError(
            f"{root}: {len(unread)} of {count} pictures have a format that is not read ({kinds}), the first "
            f"{unread[0]}: save them as .png or .jpg, or remove them"
        )


def _tell_others(root: Path, files: list[str]) -> None:
    others = [f for f in files if _suffix(f) in OTHER_SUFFIXES and os.path.basename(f) not in METADATA_FILES]
    if others:
        kinds = ", ".join(sorted({_suffix(f) for f in others}))
        say(
            f"{root}: its pictures are read, {len(others)} files ({kinds}) beside them are not looked into, the "
            f"first {others[0]}"
        )


def _plain(root: Path, pictures: list[str], files: set[str]) -> Table:
    """Captions from NAME.txt beside NAME.png, classes from the subfolders."""
    columns: dict[str, list[Any]] = {}
    beside = [f"{os.path.splitext(p)[0]}.txt" for p in pictures]
    if any(f in files for f in beside):
        columns["text"] = [read_text(f).strip() if f in files else None for f in beside]
    labels = _labels(root, pictures)
    classes = tuple(sorted({label for label in labels if label is not None}))
    if classes:
        columns["label"] = labels
    rows = rows_of({"label": labels}, len(pictures))
    return Table(Files(pictures), columns, rows, str(root), classes, expected="text" in columns)


def _labels(root: Path, pictures: list[str]) -> list[str | None]:
    """The folder of each picture, where most pictures lie equally deep in two folders or more; None for others."""
    parents = [os.path.dirname(os.path.relpath(p, root)) for p in pictures]
    depths = [len(p.split(os.sep)) if p else 0 for p in parents]
    depth, count = Counter(depths).most_common(1)[0]
    labels = [os.path.basename(p) if d == depth else None for p, d in zip(parents, depths, strict=True)]
    if depth == 0 or 2 * count <= len(pictures) or len(set(labels) - {None}) < 2:
        return [None] * len(pictures)
    return labels


def _described(root: Path, metadata: list[str], pictures: list[str], image_column: str) -> Table:
    """The pictures that metadata files list, each relative to the file's own folder."""
    key = "file_name" if image_column == "image" else f"{image_column}_file_name"
    listed: list[str] = []
    rows: list[dict[str, Any]] = []
    for path in metadata:
        for place, row in _metadata_rows(Path(path), key):
            name = row.get(key)
            if not isinstance(name, str) or not name:
                raise UserError(f'{place} has no "{key}": give it one')
            inside = os.path.normpath(name)
            if os.path.isabs(inside) or inside.startswith(".."):
                raise UserError(f"{place} names {name}: give a place below the file's own folder")
            file = os.path.join(os.path.dirname(path), inside)
            if not os.path.isfile(file):
                raise UserError(f"{place} names {name}, which is not there: mend or remove the line")
            listed.append(file)
            rows.append(row)
    if not rows:
        raise UserError(f'{metadata[0]}: names no pictures: give each a line with "{key}" and "text"')
    _check_read(metadata[0], [f for f in listed if _suffix(f) in UNREAD_SUFFIXES], len(listed))
    left = sorted(set(pictures) - set(listed))
    if left and image_column == "image":
        say(
            f"{root}: {len(left)} of {len(pictures)} pictures stand in no metadata, and are left out: {left[0]} first"
        )
    names = dict.fromkeys(name for row in rows for name in row if name != key)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(Files(listed), columns, rows_of(columns, len(rows)), metadata[0])


def _metadata_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each row is called in a message, and its values: of JSON any, of CSV text, with None for an empty cell."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            values = pyarrow.parquet.read_table(path).to_pylist()
        except Exception as error:
            raise UserError(
                f"{path}: cannot be read ({' '.join(str(error).split())[:160]}): mend it"
            ) from error
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(values))
    elif path.suffix == ".csv":
        yield from _csv_rows(path, key)
    else:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                place = f"{path}: line {number}"
                remedy = f'write {{"{key}": "a.png", "text": "its caption"}} for each picture'
                yield place, parse_json(line, place, dict, remedy=remedy)


def _csv_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = csv.reader(io.StringIO(read_text(path), newline="\n"), strict=True)
    header: list[str] | None = None
    try:
        for cells in lines:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if key not in header:
                    raise UserError(
                        f'{path}: its first line has no "{key}": name the columns there, with commas between'
                    )
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {lines.line_num} has {len(cells)} cells, the first has {len(header)}: put text "
                    "with commas in double quotes"
                )
            yield f"{path}: line {lines.line_num}", dict(zip(header, (c or None for c in cells), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.line_num} is no CSV ({error}): mend it") from error


@cache
def say(line: str) -> None:
    """A line for the user, once in a process."""
    log.warning("%s", line)
