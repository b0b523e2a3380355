"""Fixed-size records on disk, one a row, made once, resumed after an interruption, checked whenever they are opened.

A cache is two files. `<name>.rows` holds the records, appended by plain writes (a full disk is then an error that can
be reported, where a write into a mapped file would end the process); `<name>.json` says what they are, how many are
done, and a CRC-32 of every block of them. Reading maps the records into memory.
"""

import errno
import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from ..errors import UserError
from ..readers import Unreadable, read_json

log = logging.getLogger(__name__)

UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),  # read-only, or a file in the way
)
BLOCK = 1 << 22  # bytes under one checksum, at least one record
SHOWN = 3  # damaged places that a line names

Progress = Callable[[int, int], None]  # rows done, rows in all
Make = Callable[
    [int, int], dict[str, Tensor]
]  # the tensors of rows start to stop, first dimension stop - start
Fields = dict[str, tuple[str, tuple[int, ...]]]  # name: (torch dtype without "torch.", shape of one row)
Count = Annotated[int, Field(ge=0)]


class _Index(TypedDict):
    """`checksums` of blocks of `block` rows each, the last one perhaps shorter; absent from caches made without."""

    key: str
    rows: Count
    done: Count
    fields: dict[str, tuple[str, tuple[Count, ...]]]
    block: NotRequired[Annotated[int, Field(ge=1)]]
    checksums: NotRequired[list[Count]]


class Records:
    """`num_rows` records of the same named tensors in `<stem>-<hash of key>.rows` with its .json."""

    def __init__(self, stem: Path, key: str, num_rows: int):
        name = f"{stem.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
        self.data_path = stem.with_name(f"{name}.rows")
        self.index_path = stem.with_name(f"{name}.json")
        self.key = key
        self.num_rows = num_rows
        self.fields: Fields = {}
        self.block = 0
        self.checksums: list[int] | None = []  # None where the index has none
        self.bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return self.num_rows

    def build(
        self,
        rows: Make,
        batch_size: int,
        progress: Progress | None,
        is_main: bool,
        barrier: Callable[[], None],
        *,
        fresh: bool = False,
    ) -> None:
        """Append `rows(start, stop)` until all are there, then map the file in every process.

        What is there is read once and held against its checksums; the rows of a damaged block are made again, with one
        line that names them. `fresh`: everything is made again.
        """
        if is_main:
            with _writable(self.data_path), self._lock():
                if fresh:
                    self._forget()
                done = self._done()
                self._repair(rows, batch_size, done)
                self._append(rows, batch_size, progress, done)
                self._map()  # while no other run may begin the file anew
        barrier()
        if not is_main:
            self._done()
            self._map()

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        assert self.bytes is not None, "an empty cache has no rows"
        return self._split(self.bytes[np.asarray(rows, dtype=np.int64)])

    def _map(self) -> None:
        size = self.data_path.stat().st_size
        assert size == self.num_rows * self._width, f"{self.data_path}: {size} bytes after the build"
        if self.num_rows:
            shape = (self.num_rows, self._width)
            self.bytes = np.memmap(self.data_path, dtype=np.uint8, mode="r", shape=shape)

    @property
    def _width(self) -> int:
        """Bytes of one record."""
        return _width(self.fields)

    def _split(self, block: np.ndarray) -> dict[str, Tensor]:
        """The tensors of records, uint8 (n, width)."""
        out, start = {}, 0
        for name, (dtype, shape) in self.fields.items():
            stop = start + _width({name: (dtype, shape)})
            flat = torch.from_numpy(np.ascontiguousarray(block[:, start:stop]))
            out[name] = flat.view(getattr(torch, dtype)).view(len(block), *shape)
            start = stop
        return out

    def _forget(self) -> None:
        """A new file, not the old one cut: another run may have mapped that."""
        for path in (self.index_path, self.data_path):
            path.unlink(missing_ok=True)

    def _append(self, rows: Make, batch_size: int, progress: Progress | None, done: int) -> None:
        if not done:
            self.data_path.unlink(missing_ok=True)
        with open(self.data_path, "r+b" if done else "wb") as f:
            f.truncate(done * self._width)
            f.seek(0, os.SEEK_END)
            for start in range(done, self.num_rows, batch_size):
                stop = min(start + batch_size, self.num_rows)
                data = self._made(rows, start, stop)
                f.write(data)
                self._add(data, start)
                self._commit(f, stop)
                if progress is not None:
                    progress(stop, self.num_rows)
        if not self.num_rows:
            self._write_index(0)

    def _made(self, rows: Make, start: int, stop: int) -> bytes:
        tensors = {k: v.detach().cpu().contiguous() for k, v in rows(start, stop).items()}
        fields = {k: (str(v.dtype).removeprefix("torch."), tuple(v.shape[1:])) for k, v in tensors.items()}
        self.fields = self.fields or fields
        assert fields == self.fields, f"rows {start} to {stop - 1} are {fields}, those before {self.fields}"
        self.block = self.block or max(1, BLOCK // self._width)
        flat = [v.reshape(stop - start, -1).view(torch.uint8).numpy() for v in tensors.values()]
        return np.concatenate(flat, axis=1).tobytes()

    def _add(self, data: bytes, start: int) -> None:
        """Take records that follow the first `start` into the checksums."""
        assert self.checksums is not None
        rest, at, size = memoryview(data), start * self._width, self.block * self._width
        while rest:
            if at % size == 0:
                self.checksums.append(0)
            piece = rest[: size - at % size]
            self.checksums[-1] = zlib.crc32(piece, self.checksums[-1])
            rest, at = rest[len(piece) :], at + len(piece)

    def _repair(self, rows: Make, batch_size: int, done: int) -> None:
        """Hold the first `done` rows against their checksums and make those of damaged blocks again.

        Rows of a cache without checksums are taken as they are, but for numbers that are not finite.
        """
        if not done:
            return
        kept, sums, damaged = self.checksums, [], []
        self.block = self.block or max(1, BLOCK // self._width)
        with open(self.data_path, "rb") as f:
            for start in range(0, done, self.block):
                stop = min(start + self.block, done)
                data = f.read((stop - start) * self._width)
                sums.append(zlib.crc32(data))
                if not (self._finite(data) if kept is None else sums[-1] == kept[len(sums) - 1]):
                    damaged.append((start, stop))
        if kept is not None and not damaged:
            return
        self.checksums = sums
        if kept is None:
            log.warning(
                "%s: was made without checksums: it is taken as it is and watched from here on",
                self.data_path,
            )
        if damaged:
            places = ", ".join(f"{start} to {stop - 1}" for start, stop in damaged[:SHOWN])
            more = f" and {len(damaged) - SHOWN} more blocks" if len(damaged) > SHOWN else ""
            log.warning("%s: rows %s%s are damaged: making them anew", self.data_path, places, more)
        with open(self.data_path, "r+b") as f:
            for start, stop in damaged:
                f.seek(start * self._width)
                starts = range(start, stop, batch_size)
                data = b"".join(self._made(rows, i, min(i + batch_size, stop)) for i in starts)
                f.write(data)
                sums[start // self.block] = zlib.crc32(data)
            self._commit(f, done)

    def _finite(self, data: bytes) -> bool:
        tensors = self._split(np.frombuffer(bytearray(data), np.uint8).reshape(-1, self._width)).values()
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    def _commit(self, file: Any, done: int) -> None:
        """The rows reach the disk before the index that counts them."""
        file.flush()
        os.fsync(file.fileno())
        self._write_index(done)

    def _write_index(self, done: int) -> None:
        index = {"key": self.key, "rows": self.num_rows, "done": done, "fields": self.fields}
        index |= {"block": self.block or 1, "checksums": self.checksums}
        part = self.index_path.with_suffix(".part")
        part.write_text(json.dumps(index))
        part.replace(self.index_path)

    def _done(self) -> int:
        """Rows that can be kept; 0, with one line of notice, when the files are not what the index says."""
        self.fields, self.block, self.checksums = {}, 0, []
        try:
            index: _Index = read_json(self.index_path, _Index)
            size = self.data_path.stat().st_size
        except FileNotFoundError:
            return 0
        except Unreadable:
            log.warning("%s: the cache's index cannot be read: building the cache anew", self.index_path)
            return 0
        done, sums, block = index["done"], index.get("checksums"), index.get("block", 0)
        if (index["key"], index["rows"]) != (self.key, self.num_rows):
            log.warning("%s: the cache belongs to other data: building it anew", self.index_path)
            return 0
        types = (getattr(torch, dtype, None) for dtype, _ in index["fields"].values())
        consistent = done <= self.num_rows and bool(index["fields"]) == bool(done)
        consistent &= sums is None or (block > 0 and len(sums) == -(-done // block))
        if not consistent or not all(isinstance(t, torch.dtype) for t in types):
            log.warning("%s: the cache's index cannot be read: building the cache anew", self.index_path)
            return 0
        if size < done * _width(index["fields"]):
            log.warning("%s: the cache was cut short: building it anew", self.data_path)
            return 0
        if done:
            self.fields, self.block, self.checksums = index["fields"], block, sums
        return done

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Two runs that want the same cache: the second waits and finds it made."""
        lock = FileLock(self.index_path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s: another run is building this cache: waiting for it", self.data_path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    remedy = "free some space or set FEWSTEP_CACHE to a folder that can be written"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(f"{path.parent}: the cache cannot be written ({error.strerror}): {remedy}") from error


def _width(fields: Fields) -> int:
    """Bytes of one record."""
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in fields.values())
