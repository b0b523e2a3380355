"""What a search maximises: one number of the pictures of a candidate."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.search import FitnessSettings, SearchDataSettings
from ..errors import UserError
from ..metrics.extractor import extract
from ..metrics.manifold import radii
from ..metrics.reference import Reference, load_reference
from ..reports.judges import DataJudge
from ..scorers.by_name import make_scorer
from ..scorers.image_text import pair_cosines

Term = Callable[[Tensor, Sequence[str]], float]


def realism(generated: Tensor, real: Tensor, reach: Tensor) -> Tensor:
    """Realism of features (N, D): max over real ones of radius / distance (arXiv 1904.06991, eq. 3), float64 (N,).

    real (M, D); reach (M,): their distances to their k-th neighbour. Balls wider than the median are left out, as the
    paper does: outliers of a sparse region would pass anything. Above 1 a picture lies within a ball.
    """
    kept = reach <= reach.median()
    distance = torch.cdist(generated.double(), real[kept].double())
    return (reach[kept] / distance.clamp(min=torch.finfo(torch.float64).tiny)).amax(1)


class Fitness:
    """Terms and their sum, "fitness", which is higher for better pictures; NaN where a term has no value.

    judge  extractor and reference of realism and KID, and the prompts
    """

    def __init__(
        self, settings: FitnessSettings, data: SearchDataSettings, device: torch.device, batch_size: int
    ):
        self.settings, self.batch_size, self.device = settings, batch_size, device
        self.data = data
        self.options = {
            "image_column": data.image_column,
            "caption_column": data.caption_column,
            "center_crop": data.center_crop,
        }
        self.judge = DataJudge(
            data.name, data.split, None, settings.extractor, device, batch_size, self.options
        )
        self.references: dict[int, tuple[Reference, Tensor]] = {}
        self.text: Term | None = None
        self.quality: Term | None = None
        if settings.kind == "jaq":
            self.text = self._scorer(settings.text)
            realistic = settings.quality == "realism"
            self.quality = self._realism if realistic else self._scorer(settings.quality)

    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """images: uint8 (N, 3, H, W), as many captions. JAQ: text, quality and fitness; KID: kid and fitness."""
        s = self.settings
        if self.text is None or self.quality is None:
            features = extract(self.judge.network, images, self.batch_size)
            value = self._reference(images)[0].kid(features)
            return {"kid": value, "fitness": -value}
        if not any(captions):
            raise UserError("fitness.kind: jaq needs captions, and the student takes none; use kid")
        text, quality = self.text(images, captions), self.quality(images, captions)
        if s.log_text:
            text = math.log(text) if text > 0 else math.nan
        return {"text": text, "quality": quality, "fitness": text + s.weight * quality}

    def _scorer(self, spec: str) -> Term:
        scorer, measure = make_scorer(spec)
        scorer.to(self.device)
        return lambda images, captions: measure.of(pair_cosines(scorer, images, captions, self.batch_size))

    def _realism(self, images: Tensor, captions: Sequence[str]) -> float:
        reference, reach = self._reference(images)
        features = extract(self.judge.network, images, self.batch_size)
        return float(realism(features, reference.features, reach).mean())

    def _reference(self, images: Tensor) -> tuple[Reference, Tensor]:
        side = images.shape[-1]
        if side not in self.references:
            d = self.data
            real = load_reference(
                self.judge.network,
                d.name,
                d.split,
                side,
                batch_size=self.batch_size,
                data_options=self.options,
            )
            self.references[side] = real, radii(real.features, [self.settings.neighbours])[0]
        return self.references[side]


def balance(settings: FitnessSettings, trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How much each term of JAQ decided: its standard deviation over the candidates, the weight multiplied in."""
    if settings.kind != "jaq":
        return {}
    finite = [t for t in trials if t["fitness"] is not None]
    spread = {
        k: float(torch.tensor([t[k] for t in finite], dtype=torch.float64).std(correction=0))
        for k in ("text", "quality")
    }
    return {"text": spread["text"], "quality": settings.weight * spread["quality"]}
