"""Reports: read, and written whole or not at all."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ..errors import UserError
from ..metrics.protocol import LIBRARIES, Protocol, Score
from ..readers import Unreadable, check_finite, fitting, read_json
from ..training.measure import commit, processor
from ..training.run_folder import Count, Seconds, Training

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "give the file that evaluate wrote, or evaluate again"
OPEN = ConfigDict(extra="allow")
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Score(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    name: str
    value: Finite
    sd: Finite | None
    interval: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None
    values: NotRequired[list[Finite]]
    protocol: dict[str, Any]
    protocol_id: str


class _Memory(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    bytes: Count | None


class _Row(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    steps: Positive | None
    nfe: Positive | None
    seeds: Positive
    seconds_per_image: Seconds | None
    peak_memory: _Memory
    arguments: dict[str, Any]
    scores: Annotated[list[_Score], Field(min_length=1)]


class _Model(TypedDict):
    """What `compare` adds to the report of a model."""

    name: str
    method: NotRequired[str | None]
    export: NotRequired[str | None]
    training: NotRequired[Training]
    bytes: NotRequired[Count | None]
    config: NotRequired[dict[str, Any]]


class Report(TypedDict):
    """A report of `evaluate`: what tables and pages need of it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    device: str
    versions: dict[str, str]
    batch_size: Positive
    rows: Annotated[list[_Row], Field(min_length=1)]
    pipeline_sha256: NotRequired[str | None]
    commit: NotRequired[str]
    verified: NotRequired[str | None]
    model: NotRequired[_Model]


def read_report(path: Path) -> dict[str, Any]:
    """A report written by write_report. Raises UserError if it is missing, cut short or something else."""
    try:
        report: dict[str, Any] = read_json(path, Report, remedy=REMEDY)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: {REMEDY}") from None
    check_finite(report, path, remedy=REMEDY)
    for i, row in enumerate(report["rows"]):
        for record in row["scores"]:
            fitting(record["protocol"], f"{path}: rows.{i}.scores.protocol", Protocol, remedy=REMEDY)
            try:
                Score.from_json(record)
            except UserError as error:
                raise Unreadable(f"{path}: rows.{i}: {str(error).removeprefix('report: ')}") from None
        if not any(record["protocol"]["metric"] == "FD" for record in row["scores"]):
            raise Unreadable(
                f"{path}: rows.{i}: holds no FD, whose reference is the training split: {REMEDY}"
            )
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """The device's name, and the versions and commit of what computed the numbers."""
    versions = {"python": platform.python_version(), **{p: version(p) for p in LIBRARIES}}
    return {"device": device_name(device), "versions": versions, "commit": origin()}


def device_name(device: torch.device) -> str:
    """What timings depend on: the accelerator's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {processor()}, {torch.get_num_threads()} threads"


def origin() -> str:
    """The commit of a clone that this runs from, else the installed version."""
    if (ROOT / "pyproject.toml").is_file():
        return commit(ROOT)
    return f"version {version('fewstep')}"
