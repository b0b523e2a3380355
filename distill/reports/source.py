"""Where the pictures to be scored come from."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UserError
from ..methods.control.controls import Control
from .inputs import Inputs


class Source(ABC):
    """Pictures to be scored.

    conditioning  what picture i is made from: "caption", "class" or "none"
    num_classes   labels that the network knows, a null class perhaps among them; None if it does not say
    seed_rule     where the start noise of picture i comes from
    quantisation  how a picture becomes uint8; `quantise_by` sets another rule where there is a choice
    controlled    whether pictures are made from a condition picture too
    control       that the source itself names; None where it names none
    grey          whether the pictures made last had one channel
    touched       a picture that is not taken as its file is, and why; None without
    """

    conditioning: str = "none"
    num_classes: int | None = None
    grey: bool = False
    controlled: bool = False
    control: Control | None = None
    touched: str | None = None
    seed_rule: ClassVar[str]
    quantisation: str

    @abstractmethod
    def calls(
        self, steps: Sequence[int], seeds: int, guidance_scale: float | None, num_images: int
    ) -> dict[int | None, dict[str, Any]]:
        """What to score: {number of steps, or None for files: the call's keyword arguments}."""

    @abstractmethod
    def pictures(
        self,
        rows: range,
        inputs: Inputs,
        seed_block: int,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, float]:
        """Pictures `rows` as uint8 (B, 3, H, H) on the CPU and the seconds that they took.

        Grey pictures are repeated to three channels. Raises UserError if they are not square.
        """

    @abstractmethod
    def quantise_by(self, rule: Callable[[Tensor], Tensor], name: str) -> None:
        """Turn pictures in [0, 1] into uint8 by this rule; no effect on files, which are uint8 already."""

    def inputs_of(self, rows: range) -> Sequence[int]:
        """Which row of the inputs each of the pictures belongs to."""
        return rows

    def evaluations(self) -> int:
        """Samples that have passed through the denoising network so far; guidance passes each twice. 0 for files."""
        return 0

    @abstractmethod
    def identity(self) -> str:
        """Hash of all that makes the pictures, beside the call: equal content, equal pictures."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a report says about it."""


def side(name: str, images: Tensor) -> int:
    """Side in pixels of pictures (B, 3, H, W). Raises UserError if they are not square."""
    height, width = images.shape[-2:]
    if height != width:
        raise UserError(f"{name}: pictures of {width}x{height} pixels; scores need square ones")
    return height


def hash_files(folder: Path, files: Iterable[Path]) -> str:
    """sha256 of the relative paths and contents of files in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def short(folder: Path) -> str:
    """The path as it was given, but no more than the last two parts of an absolute one."""
    return "/".join(folder.parts[-2:]) if folder.is_absolute() else folder.as_posix()
