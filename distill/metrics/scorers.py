"""Scorers by name."""

from pathlib import Path

from ..errors import UserError
from .image_text import CLIP_SCORE, COSINE, Measure, Scorer
from .lite_minilm import SHIPPED, LiteMiniLM
from .open_clip_scorer import PRESETS, OpenClipScorer


def make_scorer(spec: str) -> tuple[Scorer, Measure]:
    """The scorer and the measure that `spec` stands for.

    lite0-minilm, lite2-minilm     the offline scorers, mean cosine
    PRESET or PRESET:FILE          what a paper or library computes (open_clip_scorer.PRESETS)
    MODEL:TAG, MODEL:FILE          an open_clip model, 100 x cosine; TAG is one of open_clip's, FILE a checkpoint
    MODEL:TAG:FILE                 the tag's settings, its weights from a local copy
    Raises UserError for anything else, and for what the scorer needs and does not find.
    """
    name, *rest = spec.split(":")
    if name in SHIPPED and not rest:
        return LiteMiniLM(name), COSINE
    if name in PRESETS and len(rest) <= 1:
        preset = PRESETS[name]
        return preset.load(name, Path(rest[0]) if rest else None), preset.measure
    if name in SHIPPED or name in PRESETS or len(rest) not in (1, 2) or "" in rest:
        known = ", ".join([*SHIPPED, *PRESETS])
        raise UserError(f"scorer: {spec!r}; give MODEL:TAG or MODEL:FILE of open_clip, or one of {known}")
    if len(rest) == 2:
        return OpenClipScorer(name, rest[0], Path(rest[1])), CLIP_SCORE
    if Path(rest[0]).is_file() or "/" in rest[0]:
        return OpenClipScorer(name, weights=Path(rest[0])), CLIP_SCORE
    return OpenClipScorer(name, rest[0]), CLIP_SCORE
