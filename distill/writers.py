"""Files written whole or not at all: what a killed process leaves is half of a scratch file, never of a result."""

import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def writing(path: Path, key: str = "output_dir") -> Iterator[None]:
    """A write that fails within becomes one line that names `path`, and `key` as the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(" (os error")[0]
        space = "free space or " if reason in map(os.strerror, NO_SPACE) else ""
        raise UserError(
            f"{key}: {path} could not be written ({reason}); "
            f"{space}choose another --{key}; what was saved before is intact"
        ) from error


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Run `fill` on a scratch folder beside `folder`, then put it in place in one rename."""
    scratch = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            fill(scratch)
            old = folder.with_name(f".{folder.name}.old")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            recover(folder.parent, folder.name)
            raise


def recover(parent: Path, name: str | None = None) -> None:
    """What `write_folder` and `write_file` left in `parent` when they were ended between two steps: the old folder is
    put back where the new one is missing, what is half-written is removed. `name`: of one folder, None for all."""
    pattern = "*" if name is None else glob.escape(name)
    for old in parent.glob(f".{pattern}.old"):
        folder = old.with_name(old.name[1 : -len(".old")])
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    for scratch in parent.glob(f".{pattern}.partial"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def write_file(path: Path, text: str, key: str = "output_dir") -> None:
    """Replace a small text file in one rename; `key` names the remedy of a write that fails."""
    write_bytes(path, text.encode(), key)


def write_bytes(path: Path, content: bytes, key: str = "output_dir") -> None:
    """Replace a small file in one rename."""
    scratch = path.with_name(f".{path.name}.partial")
    with writing(path, key):
        try:
            scratch.write_bytes(content)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try a file in it, before the long work. UserError if that fails."""
    try:
        if path.is_dir():
            raise IsADirectoryError("this is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = scratch_of(path)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write JSON beside `path`, then rename; on failure, a UserError, what was there stays intact."""
    part = scratch_of(path)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _not_writable(path, error) from None


def scratch_of(path: Path) -> Path:
    """Where this process writes what will be renamed to `path`; what killed ones left there is removed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = part.name.split(".")[-2]
        if process.isdigit() and not _runs(int(process)):
            part.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output {path}: cannot be written ({error.strerror or error}); choose another place or free space"
    )
