"""Trains the heads of the offline image-text scorers on cached features, and measures their retrieval."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config.validation import validate
from ..data.images import ImageData
from ..data.sources import load_data
from ..errors import UserError
from ..readers import read_tensors
from ..scorers.image_text import full_float32
from ..scorers.lite_minilm import PICTURE_RULE, SHIPPED, heads_of, load_heads, sentences, towers
from ..settings import settings
from ..writers import write_file, writing


@settings
class HeadsSettings:
    """splits: whose names the scorer may see."""

    splits: tuple[str, ...] = Field(min_length=1)


@settings
class ScorersSettings:
    """scorers: the names of lite_minilm.SHIPPED. holdout: the split of unseen names that retrieval is measured on.
    Pictures are read at `resolution`; a round of an epoch sees one picture of each name."""

    output_dir: str
    scorers: dict[str, HeadsSettings]
    data: str = "emoji"
    holdout: str = "holdout"
    resolution: int = Field(32, ge=1)
    epochs: int = Field(30, ge=0)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Pooled picture features (N, 1280) and MiniLM's means (N, 384) of N captioned pictures."""

    pictures: Tensor
    texts: Tensor
    captions: list[str]
    styles: list[str]

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(
            torch.cat([self.pictures, other.pictures]),
            torch.cat([self.texts, other.texts]),
            self.captions + other.captions,
            self.styles + other.styles,
        )


def train_scorers(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Heads <name>.safetensors and figures <name>.json of every scorer of a configuration, below output_dir.

    Features are kept in output_dir/features. Returns the figures. Raises UserError for an unknown key or scorer, and
    for splits that share a name with the hold-out or, between scorers, with each other.
    """
    config: ScorersSettings = validate(ScorersSettings, tree)
    for name in config.scorers:
        if name not in SHIPPED:
            raise UserError(f"scorers: unknown name {name!r}; available: {', '.join(SHIPPED)}")
    splits = {s: _rows(config, s) for h in config.scorers.values() for s in (*h.splits, config.holdout)}
    _check_disjoint(config, {s: set(rows.captions) for s, rows in splits.items()})
    return [train_one(name, config, splits) for name in config.scorers]


def train_one(name: str, config: ScorersSettings, splits: dict[str, ImageData]) -> dict[str, Any]:
    """Heads and figures of one scorer."""
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    seen = config.scorers[name].splits
    with torch.random.fork_rng(devices=[]), full_float32(torch.device("cpu")):
        torch.manual_seed(config.seed)
        network = towers(SHIPPED[name].trunk)
        trunk = SHIPPED[name].trunk.sha256
        pairs = {s: features(network, trunk, splits[s], root / "features") for s in (*seen, config.holdout)}
        train = pairs[seen[0]]
        for split in seen[1:]:
            train = train + pairs[split]
        losses = train_heads(network, train, config)
        path = root / f"{name}.safetensors"
        record = {"scorer": name, "data": config.data, "splits": list(seen), "seed": config.seed}
        _save(heads_of(network), path, {"training": json.dumps(record)})
        load_heads(network, path)
        figures = {
            **record,
            "names": len(set(train.captions)),
            "pictures": len(train.captions),
            "loss": {"first": losses[:1], "last": losses[-1:]},
            "retrieval": retrieval_of(network, pairs[config.holdout]),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    write_file(root / f"{name}.json", json.dumps(figures, indent=2) + "\n")
    return figures


def train_heads(network: Any, pairs: Pairs, config: ScorersSettings) -> list[float]:
    """Symmetric InfoNCE of the heads' outputs with a learned temperature (CLIP, arXiv 2103.00020, figure 3).

    Returns the mean loss of each epoch.
    """
    from open_clip import ClipLoss

    trained = [*network.visual.head.parameters(), network.text.proj.weight, network.logit_scale]
    optimiser = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    info_nce = ClipLoss()
    means = []
    for _ in tqdm(range(config.epochs), desc="heads", unit="epoch"):
        losses = []
        for rows in batches(pairs.captions, config.batch_size, generator):
            pictures, texts = encode(network, pairs.pictures[rows], pairs.texts[rows])
            loss = info_nce(pictures, texts, network.logit_scale.exp())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means


def encode(network: Any, pictures: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The heads' unit vectors (B, 384) of features of both kinds."""
    return F.normalize(network.visual.head(pictures), dim=-1), F.normalize(network.text.proj(texts), dim=-1)


def batches(captions: list[str], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """One epoch: every row once, in rounds in which each caption comes once, so that no batch repeats one.

    A last batch of a single row, which has no wrong answers, is left out.
    """
    own: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        own.setdefault(caption, []).append(row)
    shuffled = [[rows[i] for i in torch.randperm(len(rows), generator=generator)] for rows in own.values()]
    for turn in range(max(map(len, shuffled))):
        rows = [r[turn] for r in shuffled if len(r) > turn]
        order = torch.randperm(len(rows), generator=generator)
        for part in order.split(batch_size):
            if len(part) > 1:
                yield [rows[i] for i in part]


@torch.no_grad()
def retrieval_of(network: Any, pairs: Pairs) -> dict[str, dict[str, float]]:
    """For the pictures of each style: how often the own caption is the nearest, or among the nearest, of all."""
    pictures, texts = encode(network, pairs.pictures, pairs.texts)
    out = {}
    for style in dict.fromkeys(pairs.styles):
        rows = [i for i, s in enumerate(pairs.styles) if s == style]
        out[style] = retrieval(pictures[rows], texts[rows], [pairs.captions[i] for i in rows])
    return out


def retrieval(pictures: Tensor, texts: Tensor, captions: list[str]) -> dict[str, float]:
    """Recall at 1, 5 and 10 of caption i (N, D) among the distinct captions, for picture i (N, D); and chance at 1.

    pairwise  share of wrong captions that are farther than the own one; chance is 0.5
    """
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    kept = sorted(first.values())
    cosines = pictures @ texts[kept].T
    column = {captions[i]: k for k, i in enumerate(kept)}
    own = cosines[torch.arange(len(captions)), [column[c] for c in captions]]
    better = (cosines > own[:, None]).sum(1)
    shares = {f"R@{k}": float((better < k).double().mean()) for k in (1, 5, 10)}
    pairwise = 1 - float((better / (len(kept) - 1)).double().mean())
    return {**shares, "pairwise": pairwise, "chance": 1 / len(kept), "N": len(captions)}


@torch.no_grad()
def features(network: Any, trunk: str, rows: ImageData, folder: Path, batch_size: int = 64) -> Pairs:
    """Features of a split, kept in `folder` under the hash of the pictures, the captions and the image network."""
    key = hashlib.sha256(f"{trunk} {PICTURE_RULE} {rows.fingerprint}".encode()).hexdigest()
    path = folder / f"{key[:32]}.safetensors"
    if path.is_file():
        kept = read_tensors(path, remedy="delete it and repeat the command")
    else:
        pictures = []
        for start in tqdm(range(0, len(rows), batch_size), desc="features", unit="batch"):
            x = PICTURE_RULE(rows.images(range(start, min(start + batch_size, len(rows)))).float() / 255)
            pictures.append(network.visual.trunk(x.contiguous(memory_format=torch.channels_last)))
        names = list(dict.fromkeys(rows.captions))
        means = dict(
            zip(names, torch.cat([sentences(network, list(b)) for b in _split(names, 256)]), strict=True)
        )
        kept = {"pictures": torch.cat(pictures), "texts": torch.stack([means[c] for c in rows.captions])}
        folder.mkdir(parents=True, exist_ok=True)
        _save(kept, path)
    return Pairs(kept["pictures"], kept["texts"], rows.captions, [r.get("style", "all") for r in rows.rows])


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    with writing(path):
        save_file(tensors, scratch, metadata=metadata)
        scratch.replace(path)


def _split(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _rows(config: ScorersSettings, split: str) -> ImageData:
    return load_data(config.data, split=split, resolution=config.resolution)


def _check_disjoint(config: ScorersSettings, captions: dict[str, set[str]]) -> None:
    """No name of the hold-out is trained on, and no name by two scorers."""
    owner = dict.fromkeys(captions[config.holdout], config.holdout)
    for name, heads in config.scorers.items():
        for caption in sorted(set().union(*(captions[s] for s in heads.splits))):
            if caption in owner:
                raise UserError(
                    f"scorers.{name}.splits: {caption!r} belongs to {owner[caption]} too; take splits without "
                    "common names"
                )
            owner[caption] = name
