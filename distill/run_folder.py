"""The folder of one run: its configuration, log and record of what was exported."""

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from .checkpoint import write_file, writing
from .config import RunConfig, as_tree, read_yaml, with_defaults
from .errors import UserError
from .readers import Unreadable, check_finite, parse_json, read_json, read_text
from .search.config import SearchConfig

CONFIG, LOG, EXPORTED = "config.yaml", "log.jsonl", "exported.json"
# Keys that may differ when a run is taken up again: they do not touch its weights.
FREE_KEYS = {
    "output_dir", "report_to", "logging_steps", "resume_from_checkpoint", "checkpoints_total_limit",
    "validation_steps", "validation_prompts", "student.export_fused",
}  # fmt: skip

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Training(TypedDict, total=False):
    """What a run or a search took."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    steps: Count
    images: Count
    seconds: Seconds
    trained_parameters: Count
    device: str


class Exported(TypedDict):
    """exported.json: the step, the folders and the cost of the last export."""

    step: Count
    folders: list[str]
    training: Training


class LogRow(TypedDict):
    """A line of log.jsonl."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: Count


class RunFolder:
    def __init__(self, config: RunConfig | SearchConfig):
        self.config, self.path = config, Path(config.output_dir)

    def compare_config(self) -> None:
        """Refuse a folder that was started with other values; keys without effect on the result are free."""
        path = self.path / CONFIG
        if not path.is_file():
            return
        before, after = with_defaults(read_yaml(path)), as_tree(self.config)
        changed = [k for k in differing(before, after) if not {k, k.split(".")[0]} & FREE_KEYS]
        if changed:
            raise UserError(
                f"output_dir: {self.path} was started with another {', '.join(changed)}; "
                "use the same values or another --output_dir"
            )

    def write_config(self) -> None:
        """The resolved configuration, once."""
        if not (self.path / CONFIG).is_file():
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / CONFIG, yaml.safe_dump(as_tree(self.config), sort_keys=False))

    def append_log(self, row: dict[str, Any]) -> None:
        path = self.path / LOG
        with writing(path), open(path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop the lines after `step`, and a last one that was cut short: the run writes them again."""
        path = self.path / LOG
        if path.exists():
            kept = [line for line, row in log_lines(path) if row["step"] <= step]
            write_file(path, "".join(line + "\n" for line in kept))

    def record_export(self, step: int, folders: list[str], training: dict[str, Any]) -> None:
        """What was exported after which step, and what the training took."""
        record = {"step": step, "folders": folders, "training": training}
        write_file(self.path / EXPORTED, json.dumps(record, indent=2) + "\n")

    def finished(self) -> bool:
        """Whether the folder holds what this configuration's last step exports."""
        self.compare_config()
        exported = read_exported(self.path)
        if exported is None:
            return False
        whole = all((self.path / name).is_dir() for name in exported["folders"])
        if isinstance(self.config, SearchConfig):  # exports at its end alone
            return whole
        wanted = "pipeline" in exported["folders"] or not self.config.student.export_fused
        return exported["step"] >= self.config.max_train_steps and whole and wanted


def read_exported(run: Path) -> Exported | None:
    """The record of a run's last export, None before the first. Raises Unreadable for a damaged one."""
    path, remedy = run / EXPORTED, "delete it and repeat the run's command, which exports again"
    try:
        exported: Exported = read_json(path, Exported, remedy=remedy)
    except FileNotFoundError:
        return None
    check_finite(exported, path, remedy=remedy)
    return exported


def log_lines(path: Path) -> list[tuple[str, LogRow]]:
    """The lines of a log and what they say, but for a last one that an interrupted write left unfinished.

    Raises FileNotFoundError, else Unreadable with the number of the line.
    """
    remedy = "mend or delete the line"
    found: list[tuple[str, LogRow]] = []
    *lines, last = read_text(path, remedy=remedy).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append((line, parse_json(line, f"{path}: line {number}", LogRow, remedy=remedy)))
    try:
        return [*found, (last, parse_json(last, path, LogRow))]
    except Unreadable:
        return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists become text."""
    out: dict[str, Any] = {}
    for k, v in tree.items():
        if isinstance(v, dict):
            out |= flat(v, f"{prefix}{k}.")
        else:
            out[prefix + k] = v if isinstance(v, int | float | str | bool) else str(v)
    return out


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, in order."""
    a, b = flat(before), flat(after)
    return [k for k in {**a, **b} if a.get(k) != b.get(k)]
