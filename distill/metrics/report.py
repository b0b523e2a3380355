"""Reports: read, and written whole or not at all."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..measure import commit, processor

LIBRARIES = ("torch", "diffusers", "transformers", "timm", "torch-fidelity", "pillow")
ROOT = Path(__file__).resolve().parents[2]
REPORT_KEYS = ("device", "versions", "batch_size")
ROW_KEYS = ("steps", "nfe", "seeds", "seconds_per_image", "peak_memory", "arguments", "scores")


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try a file in it, before the long work. UserError if that fails."""
    probe = _beside(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("this is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write JSON beside `path`, then rename; on failure, a UserError, what was there stays intact."""
    part = _beside(path)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _not_writable(path, error) from None


def read_report(path: Path) -> dict[str, Any]:
    """A report written by write_report. Raises UserError if it is missing, cut short or something else."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable report ({error}); evaluate the pipeline again") from None
    rows = report.get("rows") if isinstance(report, dict) else None
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() >= {*ROW_KEYS} for row in rows
    )
    if not whole or not report.keys() >= {*REPORT_KEYS}:
        raise UserError(f"{path}: not a report; give the file written by evaluate, or evaluate again")
    return report


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output {path}: cannot be written ({error.strerror or error}); choose another place or free space"
    )


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
