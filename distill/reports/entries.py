"""What a comparison is made of: run folders, pipeline folders, embedded teachers, hub ids and reports."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ..errors import UserError
from ..readers import fitting, read_yaml_file
from ..teachers import EMBEDDED
from ..training.model_card import GRID, SETTINGS
from ..training.run_folder import CARD, CONFIG, read_exported
from .loading import SAMPLING, read_sampling
from .remote_code import INDEX, own_code, read_index
from .report import OPEN, read_report

HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.

    name      what it is called in the table
    pipeline  what `evaluate` scores: a pipeline folder or a hub id; None for a report made before
    report    that report; one that `compare` made says the rest too
    method, export, training   what the run folder says of how it was made; export is stock, LoRA or remote code
    bytes     of the files that a user needs to fetch beside the teacher's, None where they are not at hand
    config    the run's whole configuration as a page may show it (see `shareable`); empty where none is known
    """

    name: str
    pipeline: str | None
    report: Path | None = None
    method: str | None = None
    export: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    bytes: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class _Method(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    name: str


class _Teacher(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    path: str


class _Student(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    kind: NotRequired[str]


class _Run(TypedDict):
    """What is read of a run's configuration."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    method: _Method
    teacher: NotRequired[_Teacher | None]
    student: NotRequired[_Student | None]


def read_entry(text: str) -> Entry:
    """`[NAME=]PATH`: a run folder, a pipeline folder, an embedded teacher, a hub id, or a report of `evaluate`.

    Raises UserError where there is nothing of the kind, and for a file of it that cannot be read.
    """
    name, place = "", text
    if text not in EMBEDDED and not Path(text).exists() and "=" in text:
        name, _, place = text.partition("=")
    path = Path(place)
    if place in EMBEDDED:
        folder = EMBEDDED[place]
        return Entry(name or place, place, export=kind_of(folder), bytes=size_of(folder))
    if path.suffix == ".json":
        return _read_report(name, path)
    if ((path / CONFIG).exists() and not (path / INDEX).exists()) or (path / "pipeline" / INDEX).exists():
        return _read_run(name or path.name, path)
    if path.is_dir():
        own = path.parent.name if path.name == "pipeline" else path.name
        return Entry(name or own, place, export=kind_of(path), bytes=size_of(path))
    base = place.partition("+")[0]
    if not (base in EMBEDDED or Path(base).is_dir() or re.fullmatch(HUB_ID, base)) or path.is_file():
        raise UserError(
            f"{place}: is no folder; give a run folder, a pipeline folder, a report.json or a hub id"
        )
    return Entry(name or place, place)


def _read_report(name: str, path: Path) -> Entry:
    made = read_report(path).get("model", {"name": path.stem})
    return Entry(
        name or made["name"],
        None,
        report=path,
        method=made.get("method"),
        export=made.get("export"),
        training=made.get("training", {}),
        bytes=made.get("bytes"),
        config=made.get("config", {}),
    )


def _read_run(name: str, run: Path) -> Entry:
    pipeline, remedy = run / "pipeline", f"restore it, or give {run / 'pipeline'}"
    try:
        config = fitting(read_yaml_file(run / CONFIG, remedy=remedy), run / CONFIG, _Run, remedy=remedy)
    except FileNotFoundError:
        raise UserError(f"{run / CONFIG}: is missing: {remedy}") from None
    if not (pipeline / INDEX).exists():
        raise UserError(f"{run}: holds no pipeline to score; finish the run, for a LoRA with export_fused on")
    if not (pipeline / SAMPLING).exists():
        raise UserError(f"{pipeline / SAMPLING}: is missing: export the pipeline again")
    exported = read_exported(run)
    lora = (run / "lora").is_dir()
    student = (config.get("student") or {}).get("kind", "full")
    return Entry(
        name,
        str(pipeline),
        method=config["method"]["name"] + ("" if student == "full" else f", {student}"),
        export="LoRA" if lora else kind_of(pipeline),
        training=exported["training"] if exported else {},
        teacher=(config.get("teacher") or {}).get("path"),
        bytes=size_of(run / "lora" if lora else pipeline),
        config=shareable(config),
    )


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without the places of this machine: no output folder, the last part of a full path."""
    return {k: _without_places(v) for k, v in config.items() if k != "output_dir"}


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def kind_of(folder: Path) -> str | None:
    """ "stock" if only classes of diffusers and transformers are needed, else "remote code"; None for images.

    Raises UserError for a model_index.json that cannot be read.
    """
    if not (folder / INDEX).exists():
        return None
    own = isinstance(read_index(folder)["_class_name"], list) or own_code(folder)
    return "remote code" if own else "stock"


def size_of(folder: Path) -> int:
    """Bytes of its files, but for the model card and what lies beside it, which no pipeline loads."""
    beside = {folder / name for name in (CARD, GRID, SETTINGS)}
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p not in beside)


def offered(model: Entry, steps: Sequence[int]) -> list[int]:
    """Those of `steps` that the model can be called with; none for a report, which is taken as it is."""
    if model.pipeline is None:
        return []
    sampling = EMBEDDED.get(model.pipeline, Path(model.pipeline)) / SAMPLING
    calls = read_sampling(sampling) if sampling.exists() else {"default": {}}
    found = [n for n in steps if str(n) in calls or "default" in calls]
    if not found:
        raise UserError(f"steps: {model.name} offers {', '.join(calls)}; add one of them to --steps")
    return found
