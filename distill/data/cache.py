"""Encoded images and prompts on disk, made once, resumed after an interruption.

A cache is two files. `<name>.rows` holds fixed-size records, one per row, appended by plain writes (a full
disk is then an error that can be reported, where a write into a mapped file would end the process);
`<name>.json` says what they are and how many are done. Reading maps the records into memory.
"""

import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import UserError
from .images import ImageData

log = logging.getLogger(__name__)

UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),  # read-only, or a file in the way
)

Progress = Callable[[int, int], None]  # rows done, rows in all
Fields = dict[str, tuple[str, tuple[int, ...]]]  # name: (torch dtype without "torch.", shape of one row)


_elsewhere: ContextVar[str | None] = ContextVar("_elsewhere", default=None)


def cache_directory() -> Path:
    """That of `cache_in`, else $FEWSTEP_CACHE, else ~/.cache/fewstep."""
    chosen = _elsewhere.get() or os.environ.get("FEWSTEP_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fewstep"


@contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """Caches of this thread lie in `folder` meanwhile."""
    token = _elsewhere.set(folder)
    try:
        yield
    finally:
        _elsewhere.reset(token)


class LatentCache:
    """What an autoencoder made of every image of a data set, kept as float16."""

    def __init__(self, records: "Records"):
        self.records = records

    @classmethod
    def build(
        cls,
        data: ImageData,
        encode: Callable[[Tensor], Tensor],
        *,
        key: str,
        directory: Path | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> "LatentCache":
        """Encode what is not in the cache yet, and open it.

        encode     images (B, 3, H, W) float32 in [-1, 1] on the CPU -> (B, 2C, h, w) mean and log-variance
        key        what the latents depend on beside the images: names and fingerprints of the autoencoder
        directory  by default `cache_directory()`
        is_main    one process builds while the others wait in `barrier`

        Raises UserError when the directory cannot be written or a latent is not finite in float16.
        """

        def rows(start: int, stop: int) -> dict[str, Tensor]:
            pixels = data.images(range(start, stop))
            latents = encode(pixels.float() / 127.5 - 1).to("cpu", torch.float16)
            if not latents.isfinite().all():
                raise UserError(
                    f"latents of images {start} to {stop - 1} are not finite: run the VAE in float32"
                )
            return {"latents": latents}

        stem = (directory or cache_directory()) / "latents"
        records = Records(stem, f"latents {key} {data.fingerprint}", len(data))
        records.build(rows, batch_size, progress, is_main, barrier)
        return cls(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Latents of `rows`, float32 (n, 2C, h, w)."""
        return self.records.read(rows)["latents"].float()


class SampledLatents(LatentCache):
    """Latents without an image: `make` gives rows start to stop as (n, C, h, w), the autoencoder's mean; the variance
    is nothing."""

    LOG_VARIANCE = -30.0  # the least that AutoencoderKL gives

    @classmethod
    def made(
        cls,
        data: ImageData,
        make: Callable[[int, int], Tensor],
        *,
        key: str,
        directory: Path | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> "SampledLatents":
        """Make what is not in the cache yet, and open it; the other arguments and the errors are those of `build`."""
        stem = (directory or cache_directory()) / "sampled"
        records = Records(stem, f"sampled {key} {data.fingerprint}", len(data))
        records.build(
            lambda start, stop: {"latents": make(start, stop).to("cpu", torch.float16)},
            batch_size, progress, is_main, barrier,
        )  # fmt: skip
        return cls(records)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        mean = super().__getitem__(rows)
        return torch.cat([mean, torch.full_like(mean, self.LOG_VARIANCE)], dim=1)


class PromptCache:
    """What a text encoder made of every distinct caption, in the encoder's own precision."""

    def __init__(self, records: "Records", row_of: dict[str, int]):
        self.records = records
        self.row_of = row_of

    @classmethod
    def build(
        cls,
        captions: Sequence[str],
        encode: Callable[[list[str]], dict[str, Tensor]],
        *,
        key: str,
        directory: Path | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
        is_main: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> "PromptCache":
        """Encode the distinct captions that are not in the cache yet, and open it.

        encode  B captions -> named tensors with first dimension B, padded to the same shape for every caption

        The other arguments and the errors are those of `LatentCache.build`.
        """
        distinct = sorted(set(captions))
        listed = hashlib.blake2b(json.dumps(distinct).encode(), digest_size=16).hexdigest()
        records = Records(
            (directory or cache_directory()) / "prompts", f"prompts {key} {listed}", len(distinct)
        )
        records.build(
            lambda start, stop: encode(distinct[start:stop]), batch_size, progress, is_main, barrier
        )
        return cls(records, {caption: i for i, caption in enumerate(distinct)})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of `captions`, first dimension len(captions). KeyError for one that was not encoded."""
        return self.records.read([self.row_of[caption] for caption in captions])


class Records:
    """`num_rows` records of the same named tensors in `<stem>-<hash of key>.rows` with its .json."""

    def __init__(self, stem: Path, key: str, num_rows: int):
        name = f"{stem.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
        self.data_path = stem.with_name(f"{name}.rows")
        self.index_path = stem.with_name(f"{name}.json")
        self.key = key
        self.num_rows = num_rows
        self.fields: Fields = {}
        self.bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return self.num_rows

    def build(
        self,
        rows: Callable[[int, int], dict[str, Tensor]],
        batch_size: int,
        progress: Progress | None,
        is_main: bool,
        barrier: Callable[[], None],
    ) -> None:
        """Append `rows(start, stop)` until all are there, then map the file in every process."""
        if is_main:
            with _writable(self.data_path), self._lock():
                self._append(rows, batch_size, progress)
        barrier()
        done = self._done()
        assert done == self.num_rows, f"{self.data_path}: {done} of {self.num_rows} rows after the build"
        if done:
            width = _width(self.fields)
            self.bytes = np.memmap(self.data_path, dtype=np.uint8, mode="r", shape=(done, width))

    def forget(self) -> None:
        """Drop what is there, so that a build makes everything anew."""
        for path in (self.index_path, self.data_path):
            path.unlink(missing_ok=True)

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        assert self.bytes is not None, "an empty cache has no rows"
        block = self.bytes[np.asarray(rows, dtype=np.int64)]
        out, start = {}, 0
        for name, (dtype, shape) in self.fields.items():
            stop = start + _width({name: (dtype, shape)})
            flat = torch.from_numpy(np.ascontiguousarray(block[:, start:stop]))
            out[name] = flat.view(getattr(torch, dtype)).view(len(block), *shape)
            start = stop
        return out

    def _append(
        self, rows: Callable[[int, int], dict[str, Tensor]], batch_size: int, progress: Progress | None
    ) -> None:
        done = self._done()
        with open(self.data_path, "r+b" if done else "wb") as f:
            f.truncate(done * _width(self.fields) if done else 0)
            f.seek(0, os.SEEK_END)
            for start in range(done, self.num_rows, batch_size):
                stop = min(start + batch_size, self.num_rows)
                tensors = {k: v.detach().cpu().contiguous() for k, v in rows(start, stop).items()}
                fields = {
                    k: (str(v.dtype).removeprefix("torch."), tuple(v.shape[1:])) for k, v in tensors.items()
                }
                self.fields = self.fields or fields
                assert fields == self.fields, (
                    f"rows {start} to {stop - 1} are {fields}, those before {self.fields}"
                )
                flat = [v.reshape(stop - start, -1).view(torch.uint8).numpy() for v in tensors.values()]
                f.write(np.concatenate(flat, axis=1).tobytes())
                f.flush()
                self._write_index(stop)
                if progress is not None:
                    progress(stop, self.num_rows)
        if not self.num_rows:
            self._write_index(0)

    def _write_index(self, done: int) -> None:
        index = {"key": self.key, "rows": self.num_rows, "done": done, "fields": self.fields}
        part = self.index_path.with_suffix(".part")
        part.write_text(json.dumps(index))
        part.replace(self.index_path)

    def _done(self) -> int:
        """Rows that can be kept; 0, with one line of notice, when the files are not what the index says."""
        try:
            index = json.loads(self.index_path.read_text())
            fields: Fields = {k: (dtype, tuple(shape)) for k, (dtype, shape) in index["fields"].items()}
            done, expected = index["done"], (index["key"], index["rows"])
            size = self.data_path.stat().st_size
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s: the cache's index cannot be read: building the cache anew", self.index_path)
            return 0
        if expected != (self.key, self.num_rows):
            log.warning("%s: the cache belongs to other data: building it anew", self.index_path)
            return 0
        if size < done * _width(fields):
            log.warning("%s: the cache was cut short: building it anew", self.data_path)
            return 0
        self.fields = fields
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
