"""Tables of pictures: what every source of captioned pictures comes down to, and those that `datasets` opens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from typing import Any

from ..config.nearest import nearest
from ..errors import MissingSplit, UserError
from .images import Cells
from .named import NAMED
from .names import STYLES

SPLIT_FOLDERS = ("train", "validation", "test", "reward", "score", "holdout")
HUB_TIMEOUT = 5.0  # seconds until the Hub counts as unreachable
ROW_KEYS = ("category", "subcategory", "style")


@dataclass(frozen=True)
class Table:
    """N pictures, not decoded, and what stands beside them.

    cells     the pictures
    columns   N values for each name, None where a row has none; read when they are asked for
    rows      N dicts, as ImageData's
    classes   names of the classes in label order; empty where there are none
    expected  whether captions belong to the pictures
    where     the file or data set whose columns these are
    """

    cells: Cells
    columns: Mapping[str, Sequence[Any]]
    rows: list[dict[str, str]]
    where: str
    classes: tuple[str, ...] = ()
    expected: bool = True


class Columns(Mapping[str, list[Any]]):
    """The columns of a `datasets.Dataset` beside its pictures, class labels by their names."""

    def __init__(self, table: Any):
        import datasets

        self.table = table
        self.names = [k for k, v in table.features.items() if not isinstance(v, datasets.Image)]

    def __getitem__(self, name: str) -> list[Any]:
        import datasets

        if name not in self.names:
            raise KeyError(name)
        feature, values = self.table.features[name], self.table.select_columns(name)[:][name]
        if isinstance(feature, datasets.ClassLabel):  # -1: without a class
            return [None if v is None or v < 0 else feature.int2str(v) for v in values]
        return list(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def of_dataset(name: str, table: Any, image_column: str) -> Table:
    """A map-style `datasets.Dataset` with its images under `image_column`; class labels under "label"."""
    import datasets

    features = table.features
    found = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    if image_column == "image" and len(found) == 1 and "__key__" in features:  # shards on the Hub
        (image_column,) = found
    if image_column not in found:
        raise UserError(
            f"{name}: has no image column {image_column!r}: set image_column to one of "
            f"{', '.join(found or table.column_names)}"
        )
    columns = Columns(table)
    label = features.get("label")
    classes = tuple(label.names) if isinstance(label, datasets.ClassLabel) else ()
    texts = [c for c in ROW_KEYS if features.get(c) == datasets.Value("string")]
    kept = table.select_columns([image_column, *(c for c in ("__url__",) if c in features)])
    if image_column != "image":
        kept = kept.rename_column(image_column, "image")
    return Table(
        kept.cast_column("image", datasets.Image(decode=False)),
        columns,
        rows_of({c: columns[c] for c in (*texts, *(("label",) if classes else ()))}, len(table)),
        name,
        classes,
    )


def rows_of(columns: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, str]]:
    """category, subcategory and style where they are text; the class in "label" is the category."""
    rows: list[dict[str, str]] = [{} for _ in range(count)]
    for name in (*ROW_KEYS, "label"):
        values = columns.get(name, ())
        if all(value is None or isinstance(value, str) for value in values):
            for row, value in zip(rows, values, strict=False):
                if value is not None:
                    row["category" if name == "label" else name] = value
    return rows


def open_parquet(root: str, files: Sequence[str], image_column: str) -> Table:
    """The rows of parquet files whose images are a column."""
    table = _load("parquet", root, data_files={"train": [escape(f) for f in files]})
    return of_dataset(root, table, image_column)


def open_hub(name: str, split: str, image_column: str) -> Table:
    """A split of a Hub data set; without a connection the copy that `datasets` cached, if there is one."""
    return of_dataset(name, _open_hub(name, split), image_column)


def _open_hub(name: str, split: str) -> Any:
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
    near = nearest(name, (*STYLES, *NAMED))
    return "no local folder" + (f" (did you mean {near}?)" if near else "")


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


def no_captions(name: str, column: str, there: Sequence[str]) -> str:
    choice = f"set caption_column to one of {', '.join(there)}" if there else "add it"
    return f"{name}: has no caption column {column!r}: {choice}, or to null for no captions"
