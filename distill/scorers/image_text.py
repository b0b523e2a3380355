"""How well pictures match their captions: cosines of image and text vectors, and the numbers made of them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.extractor import check_pictures
from ..metrics.protocol import Protocol, hash_prompts
from .picture_rule import PictureRule

_TEXTS: dict[tuple[str, str], Tensor] = {}


class Scorer(nn.Module):
    """Frozen pair of encoders of pictures and texts into one space (B, D).

    name            what its numbers are labelled with
    weights_sha256  hash of everything that was trained
    picture_rule    how a picture reaches the image encoder
    text_rule       how a text reaches the text encoder: tokenizer, context length, prefix
    num_features    D
    network         the pair itself, with its learned logit_scale
    """

    name: str
    weights_sha256: str
    picture_rule: PictureRule
    text_rule: str
    num_features: int
    network: Any

    @property
    def identity(self) -> dict[str, str | int]:
        """The fields of a Protocol that this scorer fills."""
        return {
            "extractor": self.name,
            "extractor_weights_sha256": self.weights_sha256,
            "resize": str(self.picture_rule),
            "layer": self.text_rule,
            "dim": self.num_features,
        }

    def image_vectors(self, pictures: Tensor) -> Tensor:
        """Vectors (B, D), of any length, of pictures that the rule has prepared."""
        raise NotImplementedError

    def text_vectors(self, texts: list[str]) -> Tensor:
        """Vectors (B, D), of any length."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Scorer":
        """Stays in evaluation mode, also as a part of a module that is trained."""
        super().train(False)
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, D) of length one, differentiable in the images.

        Raises ValueError on pictures that are not finite or leave [0, 1].
        """
        return F.normalize(self.image_vectors(self.picture_rule(images)), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D) of length one, without gradient. Each text is encoded once a process."""
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        new = [t for t in dict.fromkeys(texts) if (key, t) not in _TEXTS]
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            vectors = F.normalize(self.text_vectors(batch), dim=-1).cpu()
            _TEXTS.update({(key, t): v for t, v in zip(batch, vectors.unbind(), strict=True)})
        return torch.stack([_TEXTS[key, t] for t in texts]).to(self.device)

    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine (B,) of picture i, float in [0, 1], with caption i; differentiable in the images."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures, but {len(captions)} captions: give one each")
        return (self.encode_images(images) * self.encode_texts(captions)).sum(1)

    @property
    def logit_scale(self) -> Tensor:
        """The learned factor that turns cosines into logits."""
        return self.network.logit_scale.exp()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@dataclass(frozen=True)
class Measure:
    """How the cosines of all pairs become one number: scale * mean, with negatives cut off at one place or none.

    metric  its name; a number is printed as "<metric> <scorer>"
    clamp   "no"; "mean": max(mean, 0); "each": the mean of max(cosine, 0)
    """

    metric: str
    scale: float
    clamp: Literal["no", "mean", "each"]

    @property
    def definition(self) -> str:
        inner = "max(cosine, 0)" if self.clamp == "each" else "cosine"
        outer = f"max(mean {inner}, 0)" if self.clamp == "mean" else f"mean {inner}"
        return f"{self.scale:g} x {outer} of each picture and its caption, float64"

    def label(self, scorer: Scorer) -> str:
        """What the number is printed as."""
        return f"{self.metric} {scorer.name}"

    def of(self, cosines: Tensor) -> float:
        """The number of cosines (N,)."""
        values = cosines.double()
        if self.clamp == "each":
            values = values.clamp(min=0)
        mean = float(values.mean())
        return self.scale * (max(mean, 0.0) if self.clamp == "mean" else mean)


COSINE = Measure("image-text cosine", 1.0, "no")
CLIP_SCORE = Measure("CLIP score", 100.0, "mean")  # torchmetrics' CLIPScore
CLIP_SCORE_HESSEL = Measure("CLIPScore (Hessel)", 2.5, "each")  # arXiv 2104.08718, equation 1


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in true float32: TF32, bfloat16 and autocast off, then as before."""
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@torch.no_grad()
def pair_cosines(scorer: Scorer, images: Tensor, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Cosines (N,) float64 on the CPU of uint8 pictures (N, 3, H, W) with their captions.

    TF32 and autocast are off. Raises ValueError on a wrong dtype, on 0/1 pictures that were never scaled to
    0..255, on another number of captions, and on cosines that are not finite.
    """
    check_pictures(images)
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} pictures, but {len(captions)} captions: give one each")
    device = scorer.device
    parts = []
    with full_float32(device):
        texts = scorer.encode_texts(captions).cpu().double()
        for batch in images.split(batch_size):
            parts.append(scorer.encode_images(batch.to(device).float() / 255).cpu().double())
    pictures = torch.cat(parts)
    cosines = F.cosine_similarity(pictures, texts, dim=1)
    bad = (~cosines.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{scorer.name}: {len(bad)} cosines are not finite, first at index {bad[0]}")
    return cosines


def image_text_protocol(
    scorer: Scorer,
    measure: Measure,
    *,
    captions: Sequence[str],
    input: str,
    conditioning: str,
    seed_rule: str,
    image_size: int,
) -> Protocol:
    """The record of a number: there is no reference but the captions, one a picture."""
    return Protocol(
        metric=measure.metric,
        definition=measure.definition,
        extractor=scorer.name,
        extractor_weights_sha256=scorer.weights_sha256,
        input=input,
        resize=str(scorer.picture_rule),
        layer=scorer.text_rule,
        dim=scorer.num_features,
        reference="captions",
        reference_sha256=hash_prompts(captions),
        n_ref=len(captions),
        n_gen=len(captions),
        prompts_sha256=hash_prompts(captions),
        conditioning=conditioning,
        seed_rule=seed_rule,
        image_size=image_size,
    )
