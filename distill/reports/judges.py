"""What generated pictures are measured against: a data set's splits, or the reference of a named protocol."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.control.controls import Control
from ..metrics.extractor import Extractor
from ..metrics.features import make_extractor
from ..metrics.frechet import INFINITY_RATIO, Moments, frechet_distance, frechet_infinity
from ..metrics.protocol import Score
from ..metrics.reference import Reference, captions_of, labels_of, load_reference, places_of
from ..protocols.prepare import open_standard
from ..protocols.verify import is_verified
from .conditions import Conditions
from .inputs import Inputs
from .pipeline_source import QUANTISATION, quantise
from .scoring import Setting, score_all
from .source import Source

LABEL_SEED = 0


def inputs_for(judge: "Judge", source: Source, count: int, control: Control | None = None) -> Inputs:
    """What `source` makes pictures 0 to count - 1 from. `control`: what conditions are taken by, in place of what the
    source itself names. Raises UserError if there is nothing of the kind."""
    if source.control is not None and control not in (None, source.control):
        raise UserError(
            f"control: the pipeline was trained with {source.control}, not {control}; leave the flag out"
        )
    control = control or source.control
    inputs = judge.inputs(source.conditioning, count)
    if control is None:
        if source.controlled:
            raise UserError(
                "control: the pipeline has an adapter and names no control; give what it sees, --control canny"
            )
        return inputs
    return replace(inputs, conditions=judge.conditions(control), controlled=source.controlled)


class Judge(ABC):
    """A network, what reaches it, and the scores of its features.

    network       sees the pictures
    crop          uint8 (N, 3, H, W) -> what the network is given, by the rule named `crop_rule`
    quantise      pipeline output in [0, 1] -> uint8, by the rule named `quantisation`
    """

    network: Extractor
    quantisation: str
    crop_rule: str = "none"

    @abstractmethod
    def crop(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def quantise(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def inputs(self, conditioning: str, count: int) -> Inputs:
        """What pictures 0 to count - 1 are made from. Raises UserError if there is nothing of the kind."""

    @abstractmethod
    def conditions(self, control: Control) -> Conditions:
        """What the control sees of the real pictures. Raises UserError if there are none."""

    @abstractmethod
    def check_side(self, side: int) -> None:
        """Raises UserError if pictures of this side in pixels cannot be measured here."""

    @abstractmethod
    def scores(self, runs: Sequence[Tensor], setting: Setting) -> list[Score]:
        """Scores of the features (N, D) of each seed's pictures."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a report says of it."""


class DataJudge(Judge):
    """Splits of a data set: KID and its kin to `split`, whose captions or labels are the inputs, beside `holdout`."""

    quantisation = QUANTISATION

    def __init__(
        self,
        data: str,
        split: str,
        holdout: str | None,
        extractor: str,
        device: torch.device,
        batch_size: int,
        data_options: Mapping[str, Any] | None,
    ):
        self.data, self.split, self.holdout = data, split, holdout
        self.batch_size, self.options, self.device = batch_size, data_options, device
        if holdout == split:
            raise UserError(f"holdout: {holdout} is the reference itself; name another split, or none")
        for name in (split, holdout):
            if name is not None:
                captions_of(data, name, data_options)
        self.network = make_extractor(extractor).to(device)
        self.references: dict[int, tuple[Reference, Reference | None]] = {}

    def crop(self, images: Tensor) -> Tensor:
        return images

    def quantise(self, images: Tensor) -> Tensor:
        return quantise(images)

    def check_side(self, side: int) -> None:
        pass  # real pictures are read at any size

    def inputs(self, conditioning: str, count: int) -> Inputs:
        if conditioning == "caption":
            captions = captions_of(self.data, self.split, self.options)
            return Inputs.of_captions([captions[i % len(captions)] for i in range(count)])
        if conditioning == "class":
            labels, classes = labels_of(self.data, self.split, self.options)
            return Inputs.of_labels([labels[i % len(labels)] for i in range(count)], classes)
        return Inputs()

    def conditions(self, control: Control) -> Conditions:
        places = places_of(self.data, self.split, self.options)
        return Conditions(control, places, self.options, self.device)

    def scores(self, runs: Sequence[Tensor], setting: Setting) -> list[Score]:
        if setting.image_size not in self.references:
            train = self._load(self.split, setting.image_size)
            unseen = None if self.holdout is None else self._load(self.holdout, setting.image_size)
            self.references[setting.image_size] = train, unseen
        return score_all(runs, *self.references[setting.image_size], setting)

    def _load(self, split: str, side: int) -> Reference:
        return load_reference(
            self.network, self.data, split, side, batch_size=self.batch_size, data_options=self.options
        )

    def record(self) -> dict[str, Any]:
        return {"verified": is_verified(self.network)}


class StandardJudge(Judge):
    """A named protocol (see `standards`), prepared by `fewstep prepare-data`: FD to its statistics.

    Labels are uniform at random, all from seed 0.
    """

    def __init__(self, name: str, device: torch.device, batch_size: int, progress: bool):
        self.opened = open_standard(name, device=device, batch_size=batch_size, progress=progress)
        self.standard, self.network = self.opened.standard, self.opened.network
        self.quantisation = f"uint8, {self.standard.quantisation.value}"
        self.crop_rule = str(self.standard.crop.value)

    def crop(self, images: Tensor) -> Tensor:
        return self.standard.crop.value(images)

    def quantise(self, images: Tensor) -> Tensor:
        return self.standard.quantise(images.float() * 2 - 1)

    def inputs(self, conditioning: str, count: int) -> Inputs:
        name = self.standard.name
        if conditioning == "caption":
            if not self.opened.prompts:
                raise UserError(
                    f"protocol: {name} has no captions for the text-to-image pipeline; choose another"
                )
            return Inputs.of_captions(self.opened.prompts[:count])
        if conditioning == "class":
            if self.standard.num_classes is None:
                raise UserError(
                    f"protocol: {name} has no classes for the class-conditional pipeline; choose another"
                )
            number = self.standard.num_classes.value
            draw = torch.Generator().manual_seed(LABEL_SEED)
            labels = torch.randint(number, (count,), generator=draw).tolist()
            return Inputs("class", labels, num_classes=number)
        return Inputs()

    def conditions(self, control: Control) -> Conditions:
        raise UserError(
            f"protocol: {self.standard.name} shows no pictures to the control {control.name!r}; use --data"
        )

    def check_side(self, side: int) -> None:
        self.standard.check(self.standard.num_images.value, side)

    def scores(self, runs: Sequence[Tensor], setting: Setting) -> list[Score]:
        """Raises UserError if the number or size of the pictures is not the protocol's."""
        self.standard.check(setting.n_gen, setting.image_size)
        reference = self.opened.reference
        distances: dict[str, Callable[[Tensor], float]] = {
            "FD": lambda x: frechet_distance(reference.moments, Moments.of(x)),
            "FD-infinity": lambda x: frechet_infinity(x, reference.moments),
        }
        if setting.n_gen < INFINITY_RATIO * self.network.num_features:
            del distances["FD-infinity"]
        return [
            Score.over_seeds(
                setting.label(metric),
                [distance(x) for x in runs],
                setting.protocol_of(metric, self.standard.name, reference.sha256, reference.moments.n),
            )
            for metric, distance in distances.items()
        ]

    def record(self) -> dict[str, Any]:
        return {"verified": is_verified(self.network), "standard": self.standard.record()}
