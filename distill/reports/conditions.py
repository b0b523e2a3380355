"""What a control is shown beside the caption: its view of real pictures, and how far generated ones are from it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..config.tree import parse_value
from ..config.validation import shown, validate
from ..data.images import ImageData
from ..data.sources import load_data
from ..diffusion.draws import Draws
from ..errors import UserError
from ..methods.control.controls import Control, ImagePrompt, View
from ..readers import Unreadable, read_json
from ..scorers.vision import Vision
from ..settings import settings


class _Notes(TypedDict):
    control: dict[str, Any]


MASK_SEED = 0
Place = tuple[str, str, int]


@settings
class Controlled:
    """Something with a control."""

    control: Control


class Conditions:
    """Condition i is what `control` sees of real picture i, repeated if there are fewer.

    places  (data set, its split, row) of each real picture; a random mask of i comes from (seed 0, i)
    device  of the control's network, where it has one
    """

    def __init__(
        self,
        control: Control,
        places: Sequence[Place],
        data_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.control, self.places, self.device = control, places, device
        self._load = lru_cache(maxsize=4)(
            lambda data, split, side: load_data(data, split=split, resolution=side, **(data_options or {}))
        )

    @property
    def name(self) -> str:
        """The control and its settings."""
        keys = {k: v for k, v in vars(self.control).items() if k != "name"}
        return f"{self.control.name}({', '.join(f'{k}={v}' for k, v in keys.items())})"

    @property
    def source(self) -> str:
        """Where the real pictures come from."""
        return " and ".join(dict.fromkeys(f"{Path(data).name}/{split}" for data, split, _ in self.places))

    def real(self, rows: Sequence[int], side: int) -> Tensor:
        """uint8 (B, 3, side, side)."""
        found = [self.places[i % len(self.places)] for i in rows]
        return torch.cat([self._set(place, side).images([place[2]]) for place in found])

    def seen(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """The control's view of uint8 pictures `rows` (B, 3, H, W): float32 of that shape, or embeddings (B, D)."""
        device = self.device if isinstance(self._view, nn.Module) else "cpu"
        return self._view(images.float().to(device) / 255, Draws(MASK_SEED, 0, rows, device)).cpu()

    def of(self, rows: Sequence[int], side: int) -> Tensor:
        """Conditions `rows`: float32 (B, 3, side, side), in [0, 1] but for hidden pixels, or embeddings (B, D)."""
        return self.seen(self.real(rows, side), rows)

    def shown(self, rows: Sequence[int], side: int) -> Tensor:
        """Pictures of conditions `rows`: float32 (B, 3, side, side) in [0, 1], hidden pixels black."""
        real = self.real(rows, side)
        return self.control.shown(real.float() / 255, self.seen(real, rows)).clamp(min=0)

    def errors(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Of uint8 pictures `rows` (B, 3, H, W): float64 (B,), as the control's definition says."""
        return self.control.error(self.of(rows, images.shape[-1]), self.seen(images, rows))

    def identity(self, rows: Sequence[int]) -> str:
        """Hash of the control and of where real pictures `rows` come from, their content included."""
        found = [self.places[i % len(self.places)] for i in rows]
        sets = {f"{p[0]} {p[1]}": self._set(p, 1).fingerprint for p in found}
        record = [self.name, sets, [[p[0], p[1], p[2]] for p in found]]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _view(self) -> View:
        view = self.control.load(Vision())
        return view.to(self.device) if isinstance(view, nn.Module) else view

    def _set(self, place: Place, side: int) -> ImageData:
        return self._load(place[0], place[1], side)


def read_control(text: str) -> Control:
    """`canny`, or YAML such as `{name: canny, low: 50}`. Raises UserError for what is no control."""
    try:
        tree = parse_value(text)
    except Unreadable:
        raise UserError(
            f"control: {shown(text)} is not readable YAML; write canny or '{{name: canny}}'"
        ) from None
    return control_of({"name": tree} if isinstance(tree, str) else tree)


def control_of(tree: Any) -> Control:
    return validate(Controlled, {"control": tree}).control


def control_in(folder: Path) -> Control | None:
    """That of an exported folder's control.json, with its own copy of a network; None without."""
    notes = folder / "control.json"
    if not notes.exists():
        return None
    remedy = "export the pipeline again"
    tree = read_json(notes, _Notes, remedy=remedy)["control"]
    try:
        control = control_of(tree)
    except UserError as error:
        raise UserError(f"{notes}: {error}: {remedy}") from None
    if isinstance(control, ImagePrompt) and (folder / control.encoder).is_dir():
        return control_of({"name": "image", "encoder": str(folder / control.encoder)})
    return control
