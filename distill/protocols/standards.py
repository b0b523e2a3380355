"""Protocols by name: what a paper's FID was computed with, and where each value is stated.

`Protocol` is the record of one number; a `Standard` is the recipe that such numbers are made by.
"""

import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from typing_extensions import TypedDict

from ..errors import UserError
from ..readers import parse_json, read_json, read_text
from .archives import Crop
from .fetched_files import RemoteFile

T = TypeVar("T")
GIVE = "give --prompts PATH"


class _Mjhq(TypedDict):
    prompt: str


class _CocoCaption(TypedDict):
    id: int
    image_id: int
    caption: str


class _Coco(TypedDict):
    annotations: list[_CocoCaption]


@dataclass(frozen=True)
class Stated(Generic[T]):
    """A value and who states it; `established` is False where no source settles it and we chose."""

    value: T
    source: str
    established: bool = True


def round_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by clip(127.5 x + 128), truncated: rounding (NVlabs/edm generate.py)."""
    return (images * 127.5 + 128).clamp(0, 255).byte()


def truncate_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by clip(127.5 (x + 1)), truncated (tianweiy/DMD2, openai/consistency_models)."""
    return ((images + 1) * 127.5).clamp(0, 255).byte()


QUANTISATIONS: dict[str, Callable[[Tensor], Tensor]] = {"round": round_pixels, "truncate": truncate_pixels}


def caption_lines(path: Path, count: int) -> list[str]:
    """The first `count` lines."""
    return _enough(path, read_text(path, remedy=GIVE).split("\n")[:-1], count)


def mjhq_names(path: Path, count: int) -> list[str]:
    """`count` keys of MJHQ-30K's meta_data.json: random.Random(0).shuffle, cut, sort (Q-Sched src/MJHQ.py)."""
    names = list(read_json(path, dict[str, _Mjhq], remedy=GIVE))
    random.Random(0).shuffle(names)
    return sorted(_enough(path, names, count))


def mjhq_prompts(path: Path, count: int) -> list[str]:
    """Prompts of `mjhq_names`, in that order."""
    rows = read_json(path, dict[str, _Mjhq], remedy=GIVE)
    return [rows[name]["prompt"] for name in mjhq_names(path, count)]


def coco_captions(path: Path, count: int) -> list[str]:
    """In COCO's annotation archive: of each val2017 image by rising id, the caption of the smallest id."""
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("annotations/captions_val2017.json")
        rows = parse_json(text, path, _Coco, remedy=GIVE)["annotations"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not COCO's 2017 annotations ({error}); give --prompts PATH") from None
    first: dict[int, tuple[int, str]] = {}
    for row in rows:
        image, caption = row["image_id"], (row["id"], row["caption"])
        first[image] = min(first.get(image, caption), caption)
    return _enough(path, [first[image][1] for image in sorted(first)], count)


PROMPT_RULES: dict[str, Callable[[Path, int], list[str]]] = {
    "lines": caption_lines,
    "mjhq": mjhq_prompts,
    "coco2017": coco_captions,
}


@dataclass(frozen=True)
class Standard:
    """One named protocol.

    num_images, image_size  generated pictures in one value, and their side in pixels
    crop                    of real and generated pictures alike, before the extractor
    quantisation            key of QUANTISATIONS
    extractor               name for make_extractor: weights, layer and resize rule
    reference               a .npz of statistics with `keys`, or a .zip of pictures if `keys` is None
    members                 which pictures of the .zip: a pattern, or "mjhq" for those of the prompts
    n_ref                   pictures in the reference
    conditioning            what picture i is made from
    prompts, prompts_rule   file of the captions and key of PROMPT_RULES; None without captions
    num_classes             labels that class-conditional pipelines are given; None without
    others                  references of the same name elsewhere, not interchangeable with this one
    """

    name: str
    num_images: Stated[int]
    image_size: Stated[int]
    crop: Stated[Crop]
    quantisation: Stated[str]
    extractor: Stated[str]
    reference: Stated[RemoteFile]
    n_ref: Stated[int]
    conditioning: Stated[str]
    keys: tuple[str, str] | None = None
    members: Stated[str] | None = None
    prompts: Stated[RemoteFile] | None = None
    prompts_rule: Stated[str] | None = None
    num_classes: Stated[int] | None = None
    others: str = ""

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """What must be fetched, beside the extractor's weights."""
        return (self.reference.value, *((self.prompts.value,) if self.prompts else ()))

    def stated(self) -> dict[str, Stated[Any]]:
        """The values with a source, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Stated)}

    @property
    def not_established(self) -> list[str]:
        """One sentence for each value that no source settles, for the report."""
        return [
            f"{name}: {_plain(stated.value)} is our choice, not established ({stated.source})"
            for name, stated in self.stated().items()
            if not stated.established
        ]

    def record(self) -> dict[str, Any]:
        """For a report: every value with its source, and what is not established."""
        values = {
            name: {"value": _plain(s.value), "source": s.source, "established": s.established}
            for name, s in self.stated().items()
        }
        return {
            "standard": self.name,
            **values,
            "not_established": self.not_established,
            "others": self.others,
        }

    def quantise(self, images: Tensor) -> Tensor:
        """Generated pictures in [-1, 1] -> uint8 by this protocol's rule."""
        return QUANTISATIONS[self.quantisation.value](images)

    def check_count(self, num_images: int) -> None:
        """Raises UserError if a run has another number of pictures than this protocol."""
        self._check("num_images", num_images, self.num_images)

    def check(self, num_images: int, image_size: int) -> None:
        """Raises UserError that names the value if a run has other than this protocol's."""
        self.check_count(num_images)
        if self.image_size.established:
            self._check("image_size", image_size, self.image_size)

    def _check(self, name: str, given: int, stated: Stated[int]) -> None:
        if given != stated.value:
            raise UserError(
                f"{name}: {given}, but protocol {self.name} has {stated.value}; use that or no --protocol"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, RemoteFile):
        return value.address or f"no address known: {value.remedy}"
    return value if isinstance(value, int | str) else str(value)


def _enough(path: Path, rows: list[str], count: int) -> list[str]:
    if len(rows) < count:
        raise UserError(f"{path}: {len(rows)} prompts, {count} are needed; give --prompts PATH")
    return rows[:count]
