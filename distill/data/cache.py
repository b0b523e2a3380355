"""Encoded images and prompts on disk, made once, resumed after an interruption."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .images import ImageData
from .records import Progress, Records

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

    def __init__(self, records: Records):
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
            return finite(
                "latents", {"latents": latents}, start, records, data.called, "run the VAE in float32"
            )

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

        def rows(start: int, stop: int) -> dict[str, Tensor]:
            latents = make(start, stop).to("cpu", torch.float16)
            return finite(
                "latents", {"latents": latents}, start, records, data.called, "give another teacher"
            )

        records.build(rows, batch_size, progress, is_main, barrier)
        return cls(records)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        mean = super().__getitem__(rows)
        return torch.cat([mean, torch.full_like(mean, self.LOG_VARIANCE)], dim=1)


class PromptCache:
    """What a text encoder made of every distinct caption, in the encoder's own precision."""

    def __init__(self, records: Records, row_of: dict[str, int]):
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

        def rows(start: int, stop: int) -> dict[str, Tensor]:
            texts = encode(distinct[start:stop])
            remedy = "set mixed_precision to bf16 or no"
            return finite(
                "prompt embeddings", texts, start, records, lambda i: repr(distinct[i][:60]), remedy
            )

        records.build(rows, batch_size, progress, is_main, barrier)
        return cls(records, {caption: i for i, caption in enumerate(distinct)})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of `captions`, first dimension len(captions). KeyError for one that was not encoded."""
        return self.records.read([self.row_of[caption] for caption in captions])


def finite(
    what: str,
    tensors: dict[str, Tensor],
    start: int,
    records: Records,
    called: Callable[[int], str],
    remedy: str,
) -> dict[str, Tensor]:
    """The tensors of the rows from `start` on. Raises UserError that names the first row with NaN or an infinity.

    called  how messages call a row
    """
    for tensor in tensors.values():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            row = start + int((~tensor.isfinite().reshape(len(tensor), -1).all(1)).nonzero()[0])
            raise UserError(
                f"{what} of row {row} in {records.data_path} are not finite ({called(row)}): {remedy}"
            )
    return tensors
