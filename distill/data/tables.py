"""Tables of images from a folder, tar shards or the Hugging Face Hub, opened by `datasets`."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from glob import escape, glob
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import MissingSplit, UserError
from .embedded import STYLES
from .named import NAMED

SPLIT_FOLDERS = ("train", "validation", "test", "reward", "score", "holdout")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HUB_TIMEOUT = 5.0  # seconds until the Hub counts as unreachable


def open_folder(folder: Path, split: str, caption_column: str | None) -> tuple[Any, bool]:
    """The table of a folder's split, and whether captions belong to it: not in a folder of images alone."""
    root = _split_folder(folder, split)
    if root != folder and any((folder / m).exists() for m in METADATA_FILES):
        raise UserError(
            f"{folder}: its metadata lies beside the split folders: put one metadata.jsonl into {root}, "
            "with file names relative to it"
        )
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    by_suffix: dict[str, list[str]] = {}
    captions_expected = False
    for parent, _, names in os.walk(root):
        for name in sorted(n for n in names if not n.startswith(".")):
            path = os.path.join(parent, name)
            by_suffix.setdefault(os.path.splitext(name)[1].lower(), []).append(path)
            captions_expected |= name in METADATA_FILES
            if name == "metadata.jsonl":
                _check_metadata(Path(path), caption_column)
    if by_suffix.keys() & set(ImageFolder.EXTENSIONS):
        table = _load("imagefolder", str(root), data_dir=escape(str(root)), data_files={"train": "**"})
        return table, captions_expected
    for suffix, builder in ((".tar", "webdataset"), (".parquet", "parquet")):
        if suffix in by_suffix:
            files = [escape(f) for f in sorted(by_suffix[suffix])]
            return _load(builder, str(root), data_files={"train": files}), True
    raise UserError(
        f"{root}: holds no images, .tar shards or .parquet files: put some in or give another folder"
    )


def _split_folder(folder: Path, split: str) -> Path:
    if (folder / split).is_dir():
        return folder / split
    there = [s for s in SPLIT_FOLDERS if (folder / s).is_dir()]
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


def _check_metadata(path: Path, caption_column: str | None) -> None:
    """Every line of a metadata.jsonl is a JSON object that names a file which is there, with its caption."""
    columns: dict[str, None] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file_name = row["file_name"]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}): mend it") from error
        except (KeyError, TypeError) as error:
            raise UserError(f'{path}: line {number} has no "file_name": give it one') from error
        if not (path.parent / file_name).is_file():
            raise UserError(
                f"{path}: line {number} names {file_name}, which is not there: mend or remove the line"
            )
        columns |= dict.fromkeys(row)
    if caption_column is not None and caption_column not in columns:
        raise UserError(no_captions(str(path), caption_column, [c for c in columns if c != "file_name"]))


def open_shards(pattern: str, split: str) -> Any:
    """Tar shards by a path, or a pattern with *, ?, [..], {a,b} or {000..099}."""
    if split != "train":
        raise MissingSplit(
            f"{pattern}: a pattern is all of split 'train': name the shards of {split!r} by one of their own"
        )
    shards = []
    for plain in expand_braces(os.path.expanduser(pattern)):
        found = [plain] if os.path.isfile(plain) else sorted(glob(plain, recursive=True))
        if not found:
            raise UserError(f"{pattern}: no file matches {plain}: give the shards that there are")
        shards += found
    wrong = [s for s in shards if not s.endswith(".tar")]
    if wrong:
        raise UserError(
            f"{wrong[0]}: is no .tar shard: give a folder of images or a pattern that ends in .tar"
        )
    return _load("webdataset", pattern, data_files={"train": [escape(s) for s in shards]})


def expand_braces(pattern: str) -> Iterator[str]:
    """The strings that a shell makes of {a,b} and {000..099}; braces inside braces are not looked into."""
    choices = []
    for part in re.split(r"(\{[^{}]*(?:,|\.\.)[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            choices.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif part.startswith("{") and part.endswith("}"):
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return map("".join, product(*choices))


def open_hub(name: str, split: str) -> Any:
    """A split of a Hub data set; without a connection the copy that `datasets` cached, if there is one."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: {_not_local(name)}, and not a data set of the Hub that you may read"
        ) from error
    except Exception as failure:
        try:
            with _offline():
                return _load(name, name, split=split)
        except UserError as error:
            if not isinstance(error.__cause__, ConnectionError | FileNotFoundError):
                raise
            reason = " ".join(f"{type(failure).__name__} {failure}".split())[:120]
            raise UserError(
                f"{name}: cannot be reached on the Hub ({reason}) and is {_not_local(name)}: "
                "give a local folder or connect to the network"
            ) from error
    return _load(name, name, split=split)


@contextmanager
def _offline() -> Iterator[None]:
    """`datasets` would try for half a minute; offline it looks into its cache at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _not_local(name: str) -> str:
    near = get_close_matches(name, (*STYLES, *NAMED), n=1)
    return "no local folder" + (f" (did you mean {near[0]}?)" if near else "")


def _load(builder: str, name: str, split: str = "train", **files: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(builder, split=split, **files)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(cause or error).split())
        if reason.startswith("Unknown split"):
            raise MissingSplit(
                f"{name}: {reason}: choose one of these, or give a folder with the subfolder {split}"
            ) from error
        raise UserError(
            f"{name}: cannot be loaded ({reason[:300]}): mend it or give another data set"
        ) from error


def no_captions(name: str, column: str, there: list[str]) -> str:
    choice = f"set caption_column to one of {', '.join(there)}" if there else "add it"
    return f"{name}: has no caption column {column!r}: {choice}, or to null for no captions"
