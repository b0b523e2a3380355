"""Features of generated pictures, made once and kept: an interrupted evaluation goes on where it stopped."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.cache import cache_directory
from ..data.records import Records
from ..metrics.extractor import Extractor, extract
from ..metrics.protocol import LIBRARIES, hash_prompts
from ..scorers.image_text import Scorer, pair_cosines
from ..training.measure import PeakMemory
from .inputs import Inputs
from .report import device_name
from .source import Source

ENOUGH = 5


@dataclass(frozen=True)
class Made:
    """What is known of `count` pictures.

    features  (N, D) float32
    cosines   (N,) float64 of each picture with its caption or the name of its class, None without a scorer
    errors    (N,) float64 of each picture's condition (see Conditions.errors), None without conditions
    seconds   seconds per image (median over full batches of the call alone)
    nfe       evaluations of the denoising network per image, counted; guidance takes two a step
    memory    peak bytes while the pictures were made, None where the system cannot tell
    side      pixels
    grey      whether the pictures had one channel
    """

    features: Tensor
    cosines: Tensor | None
    errors: Tensor | None
    seconds: float
    nfe: int
    memory: int | None
    side: int
    grey: bool


class Generation:
    """Pictures of one source, in batches of one size, as a network and perhaps a scorer see them."""

    def __init__(
        self,
        source: Source,
        network: Extractor,
        *,
        crop: Callable[[Tensor], Tensor] = lambda images: images,
        crop_rule: str = "none",
        check_side: Callable[[int], None] = lambda side: None,
        scorer: Scorer | None = None,
        batch_size: int,
        device: torch.device,
        warm_up: Mapping[str, Any],
        rank: int = 0,
        num_processes: int = 1,
    ):
        """`warm_up`: the cheapest call; one batch of it comes before the first that is timed, unless that is one of
        ENOUGH full batches or more: then the median of their times does not feel it.

        `crop`, named by `crop_rule`, comes before the network, not before the scorer. Both live on `device`.
        `check_side` sees the side of the first pictures in pixels and may refuse it.
        """
        self.source, self.batch_size, self.device = source, batch_size, device
        self.network, self.crop, self.crop_rule, self.scorer = network, crop, crop_rule, scorer
        self.check_side = check_side
        self.warm_up, self.warm = dict(warm_up), set[int]()
        self.rank, self.num_processes = rank, num_processes

    def make(
        self,
        inputs: Inputs,
        count: int,
        seed_block: int,
        arguments: dict[str, Any],
        bar: tqdm,
        *,
        fresh: bool = False,
    ) -> Made:
        """Pictures 0 to count - 1 of a seed block.

        Each process makes a share of its own, all return the whole. What the cache holds under the same source,
        call, inputs, networks, batch size, device and versions is not made again unless `fresh`.
        """
        share = -(-count // self.num_processes)
        rows = range(min(self.rank * share, count), min((self.rank + 1) * share, count))
        records = self._records(rows, inputs, seed_block, arguments)
        seen = 0

        def step(done: int, _: int) -> None:
            nonlocal seen
            bar.update(done - seen)
            seen = done

        def fill(start: int, stop: int) -> dict[str, Tensor]:
            enough = len(rows) // self.batch_size >= ENOUGH
            return self._batch(rows[start:stop], inputs, seed_block, arguments, enough)

        records.build(fill, self.batch_size, step, True, lambda: None, fresh=fresh)
        step(len(rows), len(rows))
        own = records.read(range(len(rows))) if rows else {}
        parts = gather_object([own]) if self.num_processes > 1 else [own]
        whole = {k: torch.cat([p[k] for p in parts if p]) for k in own or parts[0]}
        full = [i for i in range(len(rows)) if i // self.batch_size < len(rows) // self.batch_size]
        seconds = own["seconds"].flatten()[full or slice(None)].tolist() if rows else [0.0]
        return Made(
            features=whole["features"],
            cosines=whole["cosines"].flatten() if self.scorer is not None else None,
            errors=whole["errors"].flatten() if inputs.conditions is not None else None,
            seconds=median(seconds),
            nfe=int(whole["nfe"][0]),
            memory=int(whole["memory"].max()) or None,
            side=int(whole["side"][0]),
            grey=bool(whole["grey"][0]),
        )

    def _batch(
        self, rows: range, inputs: Inputs, seed_block: int, arguments: dict[str, Any], enough: bool
    ) -> dict[str, Tensor]:
        if not enough and (not self.warm or (len(rows) == self.batch_size and len(rows) not in self.warm)):
            self.source.pictures(range(len(rows)), inputs, 0, self.warm_up)
            self.warm.add(len(rows))
        before = self.source.evaluations()
        with PeakMemory(self.device) as peak:
            images, taken = self.source.pictures(rows, inputs, seed_block, arguments)
        self.check_side(images.shape[-1])
        nfe = (self.source.evaluations() - before) // len(rows)
        out = {"features": extract(self.network, self.crop(images), self.batch_size)}
        if self.scorer is not None:
            captions = [inputs.captions[i % len(inputs.captions)] for i in rows]
            out["cosines"] = pair_cosines(self.scorer, images, captions, self.batch_size)[:, None]
        if inputs.conditions is not None:
            out["errors"] = inputs.conditions.errors(images, self.source.inputs_of(rows))[:, None]
        out["seconds"] = torch.full((len(rows), 1), taken / len(rows))
        out["nfe"] = torch.full((len(rows), 1), nfe, dtype=torch.int32)
        out["memory"] = torch.full((len(rows), 1), peak.bytes or 0, dtype=torch.int64)
        out["side"] = torch.full((len(rows), 1), images.shape[-1], dtype=torch.int32)
        out["grey"] = torch.full((len(rows), 1), self.source.grey, dtype=torch.uint8)
        return out

    def _records(self, rows: range, inputs: Inputs, seed_block: int, arguments: dict[str, Any]) -> Records:
        network, conditions = self.network, []
        if inputs.conditions is not None:
            conditions = [inputs.controlled, inputs.conditions.identity(self.source.inputs_of(rows))]
        key = {
            "source": self.source.identity(),
            "rules": [self.source.seed_rule, self.source.quantisation, self.crop_rule],
            "arguments": arguments,
            "inputs": [inputs.conditioning, hash_prompts(inputs.of(rows)), *conditions],
            "rows": [rows.start, rows.stop, seed_block],
            "network": [network.name, network.weights_sha256, network.resize, network.layer],
            "scorer": self.scorer.identity if self.scorer is not None else None,
            "batch_size": self.batch_size,
            "device": device_name(self.device),
            "versions": [version(name) for name in LIBRARIES],
        }
        return Records(cache_directory() / "features", json.dumps(key, sort_keys=True), len(rows))
