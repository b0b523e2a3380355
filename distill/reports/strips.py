"""Strips of pictures for a comparison: the same captions or classes and noise for every model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.sources import other_split
from ..errors import MissingSplit
from ..metrics.reference import captions_of, labels_of, places_of
from ..protocols.prepare import load_prompts
from ..protocols.table import get_standard
from ..training.grid import strip
from ..writers import writing
from .conditions import Conditions, Place, read_control
from .inputs import Inputs
from .source import Source
from .trained_on import Data, read_data

SEEN, UNSEEN = 8, 4


def check_data(data: str, options: Sequence[str]) -> None:
    """Raises UserError on data that cannot be read."""
    _captions(read_data(data), dict(pairwise(options)))


def strip_inputs(source: Source, data: str, options: Sequence[str]) -> tuple[Inputs, int]:
    """What the pictures of a strip are made from, and how many of them are of the training split.

    options  flags of `evaluate`, of which --protocol, --split, --holdout and --control count

    Captions of the training split, then of the hold-out, with the conditions of their first pictures; the classes in
    turn; or nothing, with empty captions. Raises UserError on data that cannot be read.
    """
    given, chosen = dict(pairwise(options)), read_data(data)
    blank = Inputs("none", [""] * SEEN, [""] * SEEN), SEEN
    if source.conditioning == "caption":
        captions, seen, places = _captions(chosen, given)
        control = read_control(given["--control"]) if "--control" in given else source.control
        if not captions:
            return blank
        inputs = Inputs.of_captions(captions)
        if source.controlled and control is not None:
            inputs = replace(inputs, conditions=Conditions(control, places, chosen.options), controlled=True)
        return inputs, seen
    if source.conditioning == "class":
        classes = _classes(chosen, given)
        labels = [i % len(classes) for i in range(SEEN + UNSEEN)]
        return Inputs.of_labels(labels, classes), len(labels)
    return blank


def draw_strips(
    source: Source, calls: Mapping[int, dict[str, Any]], inputs: Inputs, folder: Path, name: str
) -> dict[int | None, str]:
    """The file, below the parent of `folder`, with one strip for each call: picture i from noise seed i."""
    files: dict[int | None, str] = {}
    for n, arguments in calls.items():
        images, _ = source.pictures(range(len(inputs.captions)), inputs, 0, arguments)
        files[n] = _save(images, folder / f"{name}-{n}.png")
    return files


def draw_conditions(inputs: Inputs, side: int, folder: Path, name: str) -> str:
    """The file with pictures of the conditions of a strip."""
    assert inputs.conditions is not None
    shown = inputs.conditions.shown(range(len(inputs.captions)), side)
    return _save((shown * 255).round().byte(), folder / f"{name}-condition.png")


def _save(images: Tensor, path: Path) -> str:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        strip(images).save(path)
    return f"{path.parent.name}/{path.name}"


def _captions(data: Data, given: Mapping[str, str]) -> tuple[list[str], int, list[Place]]:
    """Captions, how many are of the reference split, and where the first picture of each stands."""
    if "--protocol" in given:
        return load_prompts(get_standard(given["--protocol"]))[:SEEN], SEEN, []
    split = given.get("--split", "train")
    seen = _first(data, split, SEEN)
    if not any(seen):
        return [], SEEN, []
    try:
        holdout = given.get("--holdout", other_split(data.name, split))
        unseen = {} if holdout == "none" else _first(data, holdout, UNSEEN)
    except MissingSplit:
        unseen = {}
    return [*seen, *unseen], len(seen), [*seen.values(), *unseen.values()]


def _first(data: Data, split: str, count: int) -> dict[str, Place]:
    """The first different captions of a split and where their pictures stand."""
    found: dict[str, Place] = {}
    captions = captions_of(data.name, split, data.options)
    places = places_of(data.name, split, data.options)
    for caption, place in zip(captions, places, strict=True):
        if len(found) == count:
            break
        found.setdefault(caption, place)
    return found


def _classes(data: Data, given: Mapping[str, str]) -> Sequence[str]:
    if "--protocol" in given:
        number = get_standard(given["--protocol"]).num_classes
        return [f"class {i}" for i in range(number.value)] if number else []
    return labels_of(data.name, given.get("--split", "train"), data.options)[1]
