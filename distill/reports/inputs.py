"""What generated pictures are made from: captions, class labels, or noise alone, and what a control was shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics.protocol import hash_prompts
from .conditions import Conditions


@dataclass(frozen=True)
class Inputs:
    """The inputs of pictures, in order; picture i is made from entry i, repeated if there are fewer.

    conditioning  "caption", "class" or "none"
    values        captions or labels that a source is called with
    captions      what to score the pictures with: the captions, or the names of the classes; empty without
    num_classes   labels lie below it; 0 without labels
    conditions    pictures are scored against them; None without
    controlled    a source is called with them too
    """

    conditioning: str = "none"
    values: Sequence[str] | Sequence[int] = ()
    captions: Sequence[str] = ()
    num_classes: int = 0
    conditions: Conditions | None = None
    controlled: bool = False

    @property
    def law(self) -> str:
        """As a Protocol says it."""
        if self.conditions is None or not self.controlled:
            return self.conditioning
        return f"{self.conditioning}, {self.conditions.name}"

    def of(self, rows: range) -> list[str | int]:
        """The values of pictures `rows`; empty without."""
        return [self.values[i % len(self.values)] for i in rows] if self.values else []

    @classmethod
    def of_captions(cls, captions: Sequence[str]) -> "Inputs":
        """Captions; where all are empty, pictures are made from them all the same, but from no caption."""
        return cls("caption", captions, captions) if any(captions) else cls("none", captions)

    @classmethod
    def of_labels(cls, labels: Sequence[int], classes: Sequence[str]) -> "Inputs":
        """Labels, each the place of its name in `classes`."""
        return cls("class", labels, [classes[i] for i in labels], len(classes))

    @property
    def sha256(self) -> str:
        """prompts_sha256 of a Protocol."""
        return hash_prompts(self.values) if self.conditioning != "none" else ""
