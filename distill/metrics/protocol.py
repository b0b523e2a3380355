"""What a number was measured with: only numbers of one protocol may stand in one column."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .kid import mean_sd


@dataclass(frozen=True)
class Protocol:
    """Every choice that changes the number, and nothing of the model that is measured.

    metric, definition       which number, by which formula and scale
    extractor .. dim         features: name, weights hash, resize rule, layer, dimension
    input                    dtype and quantisation of the pictures before the extractor
    reference .. n_ref       real pictures: data set and split, hash of pixels and captions, how many
    n_gen                    pictures (prompts for a caption match) in one value; seeds repeat it
    conditioning             "caption" or "class": picture i is made from that of reference row i; "none"
    prompts_sha256           hash of the captions or class labels in order; empty without
    seed_rule, image_size    start noise of picture i; side of the generated pictures in pixels
    """

    metric: str
    definition: str
    extractor: str
    extractor_weights_sha256: str
    input: str
    resize: str
    layer: str
    dim: int
    reference: str
    reference_sha256: str
    n_ref: int
    n_gen: int
    conditioning: str
    prompts_sha256: str
    seed_rule: str
    image_size: int

    @property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the fields as sorted JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Score:
    """A number, its standard deviation over seeds (None for one seed) or 95 % interval, and its protocol.

    values  of the seeds in their order: two models' scores under one protocol have the same prompts and noise in each
            place, so that their difference can be taken seed by seed; empty where they were not kept
    """

    name: str
    value: float
    sd: float | None
    protocol: Protocol
    interval: tuple[float, float] | None = None
    values: tuple[float, ...] = ()

    @classmethod
    def over_seeds(
        cls,
        name: str,
        values: Sequence[float],
        protocol: Protocol,
        interval: tuple[float, float] | None = None,
    ) -> "Score":
        """Mean and standard deviation (ddof 1) of the values of each seed."""
        return cls(name, *mean_sd(values), protocol, interval, tuple(values))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a report; `protocol_id` is there for readers and checked by from_json."""
        return {**asdict(self), "protocol_id": self.protocol.id}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Score":
        """The inverse of to_json. Raises UserError if a key is missing or the protocol was edited."""
        try:
            protocol = Protocol(**record["protocol"])
            low_high = record["interval"]
            interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
            values = tuple(record.get("values", ()))
            score = cls(record["name"], float(record["value"]), record["sd"], protocol, interval, values)
            stored = record["protocol_id"]
        except (KeyError, TypeError) as error:
            raise UserError(f"report: not a score ({error}); evaluate the pipeline again") from None
        if stored != protocol.id:
            raise UserError(
                f"report: {score.name}: protocol_id {stored}, but its fields give {protocol.id}; evaluate again"
            )
        return score


def comparable(scores: Sequence[Score]) -> None:
    """Raises UserError if two scores differ in more than what pictures are made from: captions, classes, nothing, a
    control beside them. Those of one kind must be made from the same."""
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        kinds.setdefault(score.protocol.conditioning, []).append(score)
    for kind in kinds.values():
        same_protocol(kind)
    same_protocol([kind[0] for kind in kinds.values()], but=("conditioning", "prompts_sha256"))


def same_protocol(scores: Sequence[Score], but: Sequence[str] = ()) -> Protocol:
    """The one protocol of all scores, `but` these fields. Raises UserError that names the first in which two differ."""
    if not scores:
        raise ValueError("no scores to compare")
    first = scores[0].protocol
    for score in scores[1:]:
        for field in (f for f in fields(Protocol) if f.name not in but):
            a, b = getattr(first, field.name), getattr(score.protocol, field.name)
            if a != b:
                raise UserError(
                    f"{score.name}: not comparable, {field.name} differs: {a!r} and {b!r}; "
                    "evaluate both with the same settings"
                )
    return first


def hash_pictures(chunks: Iterable[Tensor], shape: tuple[int, ...], captions: Sequence[str]) -> str:
    """sha256 of uint8 pictures (N, 3, H, W) = `shape`, given in chunks, and their captions."""
    digest = hashlib.sha256(str(shape).encode())
    for images in chunks:
        assert images.dtype == torch.uint8 and images.shape[1:] == shape[1:]
        digest.update(images.cpu().contiguous().numpy())
    digest.update(json.dumps(list(captions)).encode())
    return digest.hexdigest()


def hash_prompts(prompts: Sequence[str | int]) -> str:
    """sha256 of the captions or class labels in order; empty if there are none."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest() if prompts else ""


LIBRARIES = ("torch", "diffusers", "transformers", "timm", "torch-fidelity", "pillow")
