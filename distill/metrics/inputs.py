"""What generated pictures are made from: captions, class labels, or noise alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from .protocol import hash_prompts


@dataclass(frozen=True)
class Inputs:
    """The inputs of pictures, in order; picture i is made from entry i, repeated if there are fewer.

    conditioning  as a Protocol says it: "caption", "class" or "none"
    values        captions or labels that a source is called with
    captions      what to score the pictures with: the captions, or the names of the classes; empty without
    num_classes   labels lie below it; 0 without labels
    """

    conditioning: str = "none"
    values: Sequence[str] | Sequence[int] = ()
    captions: Sequence[str] = ()
    num_classes: int = 0

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
