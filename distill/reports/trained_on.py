"""The data that a pipeline is scored on where nobody names others: what it was trained on."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ..config.tree import read_yaml
from ..data.sources import load_data, other_split
from ..errors import MissingSplit, UserError
from ..readers import Unreadable, fitting, parse_yaml
from ..teachers import EMBEDDED, TRAINED_ON
from ..training.run_folder import CONFIG
from ..training.teacher_data import NAME as MADE_BY_TEACHER

DEFAULTS: dict[str, Any] = {"caption_column": "text", "image_column": "image", "center_crop": True}


class _Data(TypedDict):
    name: str
    split: NotRequired[str]
    caption_column: NotRequired[str | None]
    image_column: NotRequired[str]
    center_crop: NotRequired[bool]


class _Report(TypedDict, total=False):
    name: str | None
    split: str


@dataclass(frozen=True)
class Data:
    """A data set, the split that is the reference, and the arguments of load_data that are not its defaults."""

    name: str
    split: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """As `read_data` reads it, without the split."""
        return json.dumps({"name": self.name, **self.options}) if self.options else self.name

    @classmethod
    def of(cls, tree: _Data, split: str) -> "Data":
        options = {k: tree[k] for k, v in DEFAULTS.items() if k in tree and tree[k] != v}  # type: ignore[literal-required]
        return cls(tree["name"], split, options)


def read_data(text: str) -> Data:
    """A name or a folder as of `load_data`, or YAML with its other arguments: `{name: photos, caption_column: null}`.

    Raises UserError for keys that are none of them.
    """
    tree = None
    if text.startswith("{"):  # a pattern such as {a,b}.tar does too
        with suppress(Unreadable):
            tree = parse_yaml(text, "data")
    if not isinstance(tree, dict) or "name" not in tree:
        return Data(text)
    for key in tree:
        if key not in ("name", *DEFAULTS):
            raise UserError(f"data.{key}: no such key; there are name, {', '.join(DEFAULTS)}")
    return Data.of(fitting(tree, "data", _Data), "train")


def trained_on(pipeline: str) -> Data | None:
    """That of an embedded teacher or of the run in whose folder a pipeline lies; None where nothing says it.

    Of a search the pictures of its report. Raises UserError if there is no such folder, or a damaged configuration.
    """
    check_place(pipeline)
    name = pipeline if Path(pipeline).exists() else pipeline.partition("+")[0]
    folder = EMBEDDED.get(name, Path(name)).resolve()
    for teacher, place in EMBEDDED.items():
        if folder == place.resolve():
            return Data(TRAINED_ON[teacher])
    path = folder.parent / CONFIG
    if not (folder / "model_index.json").is_file() or not path.is_file():
        return None
    tree = read_yaml(path)
    if "data" not in tree:
        return None
    data: _Data = fitting(tree["data"], f"{path}: data", _Data)
    if data["name"] == MADE_BY_TEACHER:
        return None
    if "report" not in tree:  # a search has one
        return Data.of(data, data.get("split", "train"))
    report: _Report = fitting(tree.get("report") or {}, f"{path}: report", _Report)
    return Data.of({**data, "name": report.get("name") or data["name"]}, report.get("split", "train"))


def data_for(pipelines: Sequence[str], otherwise: str | None = None) -> Data:
    """What the pipelines were trained on, those apart of which nothing is known; if that is all, what `otherwise` was.

    Raises UserError where nothing is known, or where they differ.
    """
    found = [data for data in map(trained_on, pipelines) if data is not None]
    if not found and otherwise is not None:
        found = [data for data in (trained_on(otherwise),) if data is not None]
    if not found:
        raise UserError(
            f"data: nothing says what {', '.join(pipelines)} {'was' if len(pipelines) == 1 else 'were'} trained on; "
            "give --data NAME_OR_FOLDER"
        )
    names = dict.fromkeys(f"{data}, split {data.split}" for data in found)
    if len(names) > 1:
        raise UserError(
            f"data: the models were trained on different data ({' and '.join(names)}); choose with --data"
        )
    return found[0]


def default_holdout(data: Data, split: str) -> str | None:
    """The split of unseen pictures that is compared with where nobody names one; None if it is not there.

    What cannot be read counts as there: whoever reads it says what is wrong.
    """
    name = other_split(data.name, split)
    if name == split:
        return None
    try:
        load_data(data.name, split=name, resolution=1, **data.options)
    except MissingSplit:
        return None
    except UserError:
        pass
    return name


def reference_of(pipeline: str, data: str | None, split: str | None, holdout: str | None) -> dict[str, Any]:
    """The real pictures that a pipeline is scored on, as arguments of `evaluate`: data, data_options, split, holdout.

    data: as of `read_data`, None for what the pipeline was trained on. holdout: "none" for none, None for the split of
    unseen pictures, if there is one.
    """
    found = read_data(data) if data else data_for([pipeline])
    split = split or found.split
    unseen = None if holdout == "none" else holdout or default_holdout(found, split)
    return {"data": found.name, "data_options": found.options, "split": split, "holdout": unseen}


def check_place(pipeline: str) -> None:
    """Raises UserError for what is neither an embedded teacher, a folder nor the form of a hub id, each perhaps with
    +LORA."""
    name = pipeline if Path(pipeline).exists() else pipeline.partition("+")[0]
    path = EMBEDDED.get(name, Path(name))
    if not path.is_dir() and (path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)):
        raise UserError(f"{name}: no such folder; give a pipeline folder, a folder of images or a hub id")
