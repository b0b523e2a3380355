"""Reports: read, and written whole or not at all."""

import json
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError


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
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise UserError(f"{path}: not a report (no rows); give the file written by evaluate")
    return report


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output {path}: cannot be written ({error.strerror or error}); choose another place or free space"
    )


def machine(device: torch.device) -> dict[str, Any]:
    """The device's name and the versions of what computed the numbers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("torch", "diffusers", "transformers", "timm")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    return {"device": f"{device.type}: {name}", "versions": versions}


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak bytes, and of what: the CUDA allocator, or the process's resident memory since it started."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "measure": "cuda max_memory_allocated"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "measure": "ru_maxrss of the process",
    }
