"""Features of generated pictures, made once and kept: an interrupted evaluation goes on where it stopped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.cache import Records, cache_directory
from .features import Extractor, extract
from .protocol import hash_prompts
from .source import Source

LIBRARIES = ("torch", "diffusers", "transformers", "timm")


@dataclass(frozen=True)
class Made:
    """What is known of `count` pictures.

    features  {name of the network: (N, D) float32}
    seconds   seconds per image (median over full batches of the call alone)
    nfe       evaluations of the denoising network per image, counted; guidance takes two a step
    side      pixels
    """

    features: dict[str, Tensor]
    seconds: float
    nfe: int
    side: int


class Generation:
    """Pictures of one source, in batches of one size, seen by some networks."""

    def __init__(
        self,
        source: Source,
        networks: Sequence[Extractor],
        *,
        batch_size: int,
        device: torch.device,
        warm_up: Mapping[str, Any],
        rank: int = 0,
        num_processes: int = 1,
    ):
        """`warm_up`: the cheapest call; one batch of it comes before the first that is timed."""
        self.source, self.networks, self.batch_size, self.device = source, networks, batch_size, device
        self.warm_up, self.warm = dict(warm_up), False
        self.rank, self.num_processes = rank, num_processes

    def make(
        self,
        prompts: Sequence[str],
        count: int,
        seed_block: int,
        arguments: dict[str, Any],
        bar: tqdm,
        *,
        fresh: bool = False,
    ) -> Made:
        """Pictures 0 to count - 1 of a seed block.

        Each process makes a share of its own, all return the whole. What the cache holds under the same source,
        call, prompts, networks, batch size, device and versions is not made again unless `fresh`.
        """
        share = -(-count // self.num_processes)
        rows = range(min(self.rank * share, count), min((self.rank + 1) * share, count))
        records = self._records(rows, prompts, seed_block, arguments)
        if fresh:
            records.forget()
        seen = 0

        def step(done: int, _: int) -> None:
            nonlocal seen
            bar.update(done - seen)
            seen = done

        def fill(start: int, stop: int) -> dict[str, Tensor]:
            return self._batch(rows[start:stop], prompts, seed_block, arguments)

        records.build(fill, self.batch_size, step, True, lambda: None)
        step(len(rows), len(rows))
        own = records.read(range(len(rows))) if rows else {}
        parts = gather_object([own]) if self.num_processes > 1 else [own]
        whole = {k: torch.cat([p[k] for p in parts if p]) for k in own or parts[0]}
        full = [i for i in range(len(rows)) if i // self.batch_size < len(rows) // self.batch_size]
        seconds = own["seconds"].flatten()[full or slice(None)].tolist() if rows else [0.0]
        return Made(
            features={n.name: whole[n.name] for n in self.networks},
            seconds=median(seconds),
            nfe=int(whole["nfe"][0]),
            side=int(whole["side"][0]),
        )

    def _batch(
        self, rows: range, prompts: Sequence[str], seed_block: int, arguments: dict[str, Any]
    ) -> dict[str, Tensor]:
        if not self.warm:
            self.source.pictures(range(len(rows)), prompts or [""], 0, self.warm_up)
            self.warm = True
        before = self.source.evaluations()
        images, taken = self.source.pictures(rows, prompts, seed_block, arguments)
        nfe = (self.source.evaluations() - before) // len(rows)
        out = {n.name: extract(n, images, self.batch_size) for n in self.networks}
        out["seconds"] = torch.full((len(rows), 1), taken / len(rows))
        out["nfe"] = torch.full((len(rows), 1), nfe, dtype=torch.int32)
        out["side"] = torch.full((len(rows), 1), images.shape[-1], dtype=torch.int32)
        return out

    def _records(
        self, rows: range, prompts: Sequence[str], seed_block: int, arguments: dict[str, Any]
    ) -> Records:
        key = {
            "source": self.source.identity(),
            "rules": [self.source.seed_rule, self.source.quantisation],
            "arguments": arguments,
            "prompts": hash_prompts([prompts[i % len(prompts)] for i in rows] if prompts else []),
            "rows": [rows.start, rows.stop, seed_block],
            "networks": [[n.name, n.weights_sha256, n.resize, n.layer] for n in self.networks],
            "batch_size": self.batch_size,
            "device": device_name(self.device),
            "versions": [version(name) for name in LIBRARIES],
        }
        return Records(cache_directory() / "features", json.dumps(key, sort_keys=True), len(rows))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
