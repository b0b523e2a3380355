"""One command at a time in a folder: a lock that the kernel releases however the process ends."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..writers import writing
from .processes import rank

LOCK = ".lock"
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Hold `folder` for one command; of a launch's processes the first holds it for all.

    The folder is made if it is missing; one that was made and holds nothing at the end is removed, and so is the lock's
    file. Raises UserError, which names `key` and the holder, where another process has it.
    """
    if rank() > 0:
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        with writing(folder, key):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(folder / LOCK)
        if descriptor is None:
            raise UserError(
                f"{key}: {folder} is in use by {_holder(folder / LOCK)}; wait for it, or choose another --{key}"
            )
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # before it is released: no one else can hold it
            os.close(descriptor)
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds something
                break


def _acquire(path: Path) -> int | None:
    """A descriptor that holds the lock, None where another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            print(
                f"fewstep: warning: {path.parent}: this file system has no locks; start no second command in it",
                file=sys.stderr,
            )
        if _is(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its holder removed it in between


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "another command"
    except OSError:
        return "another command"
