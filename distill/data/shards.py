"""Webdataset shards: tar files whose members share a name up to its first dot where they make one sample."""

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from glob import glob
from itertools import product
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..readers import parse_json
from .images import PICTURE_SUFFIXES, UNREAD_SUFFIXES
from .tables import Table

BLOCK = tarfile.BLOCKSIZE
CUT = "is cut short"
MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")

Place = tuple[int, int]  # where a member's bytes begin, and how many they are
Sample = tuple[str, str, dict[str, Place]]  # shard, name, members by what follows the first dot


class Pictures:
    """The encoded picture of every sample, read from its shard when it is asked for."""

    def __init__(self, places: Sequence[tuple[str, str, Place]]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, name, place = self.places[index]
        return {"image": {"path": name, "bytes": _read(shard, place)}, "__url__": shard}


class Texts(Mapping[str, list[Any]]):
    """The columns of samples: "text" or "txt" from .txt, any x.txt as "x.txt", "cls", and the keys of .json."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = samples
        fields = dict.fromkeys(field for *_, members in samples for field in members)
        self.files = [f for f in fields if f.rpartition(".")[2] in ("txt", "cls")]

    def __getitem__(self, name: str) -> list[Any]:
        field = "txt" if name == "text" and "txt" in self.files else name
        if field in self.files:
            return [self._text(sample, field) for sample in self.samples]
        if name not in self._described:
            raise KeyError(name)
        return [None if row is None else row.get(name) for row in self._json]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.files, *self._described])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _json(self) -> list[dict[str, Any] | None]:
        return [self._json_of(sample) for sample in self.samples]

    @cached_property
    def _described(self) -> dict[str, None]:
        return dict.fromkeys(key for row in self._json if row is not None for key in row)

    def _json_of(self, sample: Sample) -> dict[str, Any] | None:
        shard, name, members = sample
        if "json" not in members:
            return None
        told: dict[str, Any] = parse_json(_read(shard, members["json"]), f"{shard}: {name}.json", dict)
        return told

    def _text(self, sample: Sample, field: str) -> str | None:
        shard, name, members = sample
        if field not in members:
            return None
        try:
            return _read(shard, members[field]).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{shard}: {name}.{field} is not UTF-8 text (byte {error.start}): write it again as UTF-8"
            ) from None


def open_shards(shards: Sequence[str], name: str, image_column: str) -> Table:
    """The samples of tar files in their order. Each has one picture, of any format that is read.

    image_column  "image": a sample's one picture. Else its ending, for samples of several: "jpg", "mask.png"

    Raises UserError for a file that is cut short or no tar, and for a sample without a picture.
    """
    samples: list[Sample] = []
    for shard in shards:
        try:
            stat = Path(shard).stat()
            samples += index(shard, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise UserError(
                f"{shard}: cannot be read ({error.strerror or error}): give another shard"
            ) from None
    places = [_picture(sample, image_column) for sample in samples]
    return Table(Pictures(places), Texts(samples), [{} for _ in samples], name)


def match_shards(pattern: str) -> list[str]:
    """The .tar files that a path, or a pattern with *, ?, [..], {a,b} or {000..099}, names."""
    shards = []
    for plain in expand_braces(os.path.expanduser(pattern)):
        found = [plain] if os.path.isfile(plain) else sorted(glob(plain, recursive=True))
        if not found:
            raise UserError(f"{pattern}: no file matches {plain}: give the shards that there are")
        shards += found
    wrong = [s for s in shards if not s.endswith(".tar")]
    if wrong:
        raise UserError(
            f"{wrong[0]}: is no .tar shard: give a folder of images or a pattern that ends in .tar"
        )
    return shards


def expand_braces(pattern: str) -> Iterator[str]:
    """The strings that a shell makes of {a,b} and {000..099}; braces inside braces are not looked into."""
    choices = []
    for part in re.split(r"(\{[^{}]*(?:,|\.\.)[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            choices.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif part.startswith("{") and part.endswith("}"):
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return map("".join, product(*choices))


@lru_cache(maxsize=4096)
def index(shard: str, size: int, changed: int) -> list[Sample]:
    """The samples of a tar file of `size` bytes, in the order of their first members; `changed` is its time stamp.

    Raises UserError for a file that is no tar, is cut short or goes on behind its end, and for a member given twice.
    """
    samples: dict[str, dict[str, Place]] = defaultdict(dict)
    last, reason = "", ""
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    parts = MEMBER.fullmatch(member.name)
                    if not member.isfile() or parts is None:
                        continue
                    last, field = parts[1], parts[2].lower()
                    if field in samples[last]:
                        raise UserError(f"{shard}: {member.name} is there twice: write the shard again")
                    samples[last][field] = member.offset_data, member.size
                file.seek(tar.offset)
            reason = _beyond(file)
        except tarfile.TarError as error:
            if not samples:
                raise UserError(f"{shard}: is no whole tar file ({error}): give another, unpacked") from None
            reason = CUT
    if reason:
        whole = len(samples) - (reason == CUT and last in samples)
        raise UserError(f"{shard}: {reason} behind {whole} whole samples: fetch or write it again")
    return [(shard, name, members) for name, members in samples.items()]


def _beyond(file: IO[bytes]) -> str:
    """What is wrong with a tar file behind its last member, "" for an end mark and nothing but zeros."""
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        return CUT
    if mark.strip(b"\0"):
        return "is damaged"
    rest = iter(lambda: file.read(1 << 20), b"")
    return "goes on after its end mark (two joined files?)" if any(p.strip(b"\0") for p in rest) else ""


def _picture(sample: Sample, image_column: str) -> tuple[str, str, Place]:
    shard, name, members = sample
    endings = {field: f".{field.rpartition('.')[2]}" for field in members}
    found = [f for f, ending in endings.items() if ending in PICTURE_SUFFIXES]
    if image_column != "image":
        found = [f for f in members if f == image_column]
    if len(found) == 1:
        return shard, f"{name}.{found[0]}", members[found[0]]
    if len(found) > 1:
        raise UserError(
            f"{shard}: {name} has {len(found)} pictures: set image_column to one of {', '.join(sorted(found))}"
        )
    wanted = "picture" if image_column == "image" else f"picture .{image_column}"
    unread = [f for f, ending in endings.items() if ending in UNREAD_SUFFIXES]
    why = (
        f", and .{unread[0]} is not read: write it as .png or .jpg" if unread else ": write it again with one"
    )
    raise UserError(f"{shard}: {name} has no {wanted}{why}")


def _read(shard: str, place: Place) -> bytes:
    start, size = place
    try:
        with open(shard, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error}): mend it") from error
