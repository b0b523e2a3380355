"""The folder of one run: its configuration, log and record of what was exported."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ..config.method import as_tree, with_defaults
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..config.tree import read_yaml
from ..errors import UserError
from ..readers import Unreadable, check_finite, parse_json, read_json, read_text
from ..writers import write_file, writing
from .processes import num_processes, rank
from .saved import checkpoint_folder, progress_of, saved_steps

CONFIG, LOG, EXPORTED = "config.yaml", "log.jsonl", "exported.json"
CARD = "README.md"
# Keys that may differ when a run is taken up again: they do not touch its weights.
FREE_KEYS = {
    "output_dir", "report_to", "logging_steps", "resume_from_checkpoint", "checkpoints_total_limit",
    "validation_steps", "validation_prompts", "student.export_fused",
}  # fmt: skip
# Keys that may differ where the number of processes makes up for it.
SPLIT_KEYS = {"train_batch_size", "gradient_accumulation_steps"}


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
    batch: Count


class Exported(TypedDict):
    """exported.json: the step, the folders and the cost of the last export; files: bytes of each file but the cards, by
    its path in the run folder."""

    step: Count
    folders: list[str]
    training: Training
    files: NotRequired[dict[str, Count]]


class LogRow(TypedDict):
    """A line of log.jsonl."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: Count


class RunFolder:
    def __init__(self, config: RunConfig | SearchConfig):
        self.config, self.path = config, Path(config.output_dir)

    def binding(self) -> bool:
        """Whether it holds what another configuration must not go on from: a checkpoint or raw weights, a scored
        candidate, an export. Before that a start with other values begins anew."""
        if (self.path / EXPORTED).is_file():
            return True
        if isinstance(self.config, SearchConfig):
            log = self.path / LOG
            return log.is_file() and log.stat().st_size > 0
        kept = (*self.path.glob("checkpoint-*"), *self.path.glob("raw_weights/*.safetensors"))
        return bool(kept)

    def compare_config(self, *, goes_on: bool = True) -> None:
        """Refuse a folder that was started with other values; keys without effect on the result are free.

        goes_on: steps are to follow, for which all processes together must take as many pictures as before.
        """
        path = self.path / CONFIG
        if not path.is_file() or not self.binding():
            return
        before, after = with_defaults(read_yaml(path), self.config), as_tree(self.config)
        changed = [k for k in differing(before, after) if not {k, k.split(".")[0]} & FREE_KEYS]
        batch = self.batch()
        if isinstance(self.config, RunConfig) and batch is not None:
            split, changed = SPLIT_KEYS.intersection(changed), [k for k in changed if k not in SPLIT_KEYS]
            if not changed and (split or goes_on):
                check_batch(self.config, batch, self.path)
        if changed:
            raise UserError(
                f"output_dir: {self.path} was started with another {', '.join(changed)}; "
                "use the same values or another --output_dir"
            )

    def batch(self) -> int | None:
        """Pictures of a step so far, of all processes; None where nothing says so."""
        for step in reversed(saved_steps(self.path)):
            progress = progress_of(checkpoint_folder(self.path, step))
            if progress is not None:
                return progress.get("batch")
        record = self._exported()
        return None if record is None else record["training"].get("batch")

    def write_config(self) -> None:
        """The resolved configuration, once there is something that it binds; before that the newest start's."""
        path = self.path / CONFIG
        if path.is_file() and self.binding():
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(as_tree(self.config), sort_keys=False)
        if path.is_file() and path.read_bytes() != text.encode():
            shutil.rmtree(self.path / "samples", ignore_errors=True)  # of the start that is given up
        write_file(path, text)

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
        files = {
            str(p.relative_to(self.path)): p.stat().st_size
            for name in folders
            for p in sorted((self.path / name).rglob("*"))
            if p.is_file() and p.name != CARD
        }
        record = {"step": step, "folders": folders, "training": training, "files": files}
        write_file(self.path / EXPORTED, json.dumps(record, indent=2) + "\n")

    def finished(self) -> bool:
        """Whether the folder holds, whole, what this configuration's last step exports."""
        self.compare_config(goes_on=False)
        record = self._exported()
        if record is None:
            return False
        if isinstance(self.config, RunConfig):  # a search exports at its end alone
            wanted = "pipeline" in record["folders"] or not self.config.student.export_fused
            if record["step"] < self.config.max_train_steps or not wanted:
                return False
        damaged = self._damaged(record)
        if damaged is None:
            return True
        if isinstance(self.config, RunConfig) and not saved_steps(self.path):
            raise UserError(
                f"output_dir: {damaged}, and there is no checkpoint to export from; choose another --output_dir, or "
                f"remove {self.path / EXPORTED} to train anew"
            )
        _warn(f"{damaged}; it is exported again")
        return False

    def _exported(self) -> Exported | None:
        """As `read_exported`, of a damaged one None with a warning: a run exports again."""
        try:
            return read_exported(self.path)
        except Unreadable as error:
            _warn(str(error))
            return None

    def _damaged(self, record: Exported) -> str | None:
        """The first file of an export that is missing, of another length or no JSON; None where all are whole."""
        for name in record["folders"]:
            if not (self.path / name).is_dir():
                return f"{self.path / name} is missing"
        for name, size in record.get("files", {}).items():
            path = self.path / name
            if not path.is_file():
                return f"{path} is missing"
            try:
                if path.suffix == ".json":  # which a user may have edited
                    read_json(path)
                elif path.stat().st_size != size:
                    return f"{path} has {path.stat().st_size} bytes in place of {size}"
            except Unreadable:
                return f"{path} is no JSON"
        return None


def check_batch(config: RunConfig, batch: int, folder: Path) -> None:
    """Raises UserError where all processes together do not take `batch` pictures a step."""
    size, micro, processes = config.train_batch_size, config.gradient_accumulation_steps, num_processes()
    if size * micro * processes == batch:
        return
    fitting = batch / (micro * processes)
    remedy = f"set --train_batch_size {fitting:.0f}" if fitting.is_integer() else "use as many processes"
    raise UserError(
        f"train_batch_size: {size} x {micro} accumulated x {processes} processes are {size * micro * processes} "
        f"pictures a step, {folder} was started with {batch}; {remedy}, or choose another --output_dir"
    )


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


def _warn(line: str) -> None:
    if rank() == 0:
        print(f"fewstep: warning: {line}", file=sys.stderr)
