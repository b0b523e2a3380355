"""Strips of pictures for a comparison: the same captions or classes and noise for every model."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint import writing
from ..data import other_split
from ..errors import UserError
from ..grid import strip
from .inputs import Inputs
from .prepare import load_prompts
from .reference import captions_of, labels_of
from .source import Source
from .standards import get_standard

SEEN, UNSEEN = 8, 4


def strip_inputs(conditioning: str, data: str, options: Sequence[str]) -> tuple[Inputs, int]:
    """What the pictures of a strip are made from, and how many of them are of the training split.

    options  flags of `evaluate`, of which --protocol, --split and --holdout count

    Captions of the training split, then of the hold-out; the classes in turn; or nothing, with empty captions.
    Raises UserError on data that cannot be read.
    """
    given = dict(pairwise(options))
    blank = Inputs("none", [""] * SEEN, [""] * SEEN), SEEN
    if conditioning == "caption":
        captions, seen = _captions(data, given)
        return (Inputs.of_captions(captions), seen) if captions else blank
    if conditioning == "class":
        classes = _classes(data, given)
        labels = [i % len(classes) for i in range(SEEN + UNSEEN)]
        return Inputs.of_labels(labels, classes), len(labels)
    return blank


def draw_strips(
    source: Source, calls: Mapping[int, dict[str, Any]], inputs: Inputs, folder: Path, name: str
) -> dict[int, str]:
    """The file, below the parent of `folder`, with one strip for each call: picture i from noise seed i."""
    files = {}
    for n, arguments in calls.items():
        images, _ = source.pictures(range(len(inputs.captions)), inputs.values, 0, arguments)
        path = folder / f"{name}-{n}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            strip(images).save(path)
        files[n] = f"{folder.name}/{path.name}"
    return files


def _captions(data: str, given: Mapping[str, str]) -> tuple[list[str], int]:
    if "--protocol" in given:
        return load_prompts(get_standard(given["--protocol"]))[:SEEN], SEEN
    split = given.get("--split", "train")
    captions = captions_of(data, split)
    if not any(captions):
        return [], SEEN
    seen = list(dict.fromkeys(captions))[:SEEN]
    try:
        unseen = list(dict.fromkeys(captions_of(data, given.get("--holdout", other_split(data, split)))))[
            :UNSEEN
        ]
    except UserError:  # data without a hold-out split
        unseen = []
    return seen + unseen, len(seen)


def _classes(data: str, given: Mapping[str, str]) -> Sequence[str]:
    if "--protocol" in given:
        number = get_standard(given["--protocol"]).num_classes
        return [f"class {i}" for i in range(number.value)] if number else []
    return labels_of(data, given.get("--split", "train"))[1]
