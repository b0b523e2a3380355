"""Scorers by name."""

from pathlib import Path

from ..errors import UserError, first_line
from .image_text import CLIP_SCORE, COSINE, Measure, Scorer
from .lite_minilm import SHIPPED, LiteMiniLM
from .open_clip import PRESETS, OpenClipScorer
from .pickscore import PickScore

HPSV2_MODEL, HPSV2_REPOSITORY, HPSV2_FILE = "ViT-H-14", "xswu/HPSv2", "HPS_v2.1_compressed.pt"


def make_scorer(spec: str) -> tuple[Scorer, Measure]:
    """The scorer and the measure that `spec` stands for.

    lite0-minilm, lite2-minilm     the offline scorers, mean cosine
    PRESET or PRESET:FILE          what a paper or library computes (open_clip_scorer.PRESETS)
    hpsv2, hpsv2:FILE              HPS v2.1 (arXiv 2306.09341), an open_clip ViT-H-14 with weights of its own
    pickscore, pickscore:FOLDER    PickScore v1 (arXiv 2305.01569)
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
    if name == "hpsv2" and len(rest) <= 1:
        return OpenClipScorer(HPSV2_MODEL, weights=_hpsv2_weights(rest), name="hpsv2.1"), COSINE
    if name == "pickscore" and len(rest) <= 1:
        return PickScore(*rest), COSINE
    own = [*SHIPPED, *PRESETS, "hpsv2", "pickscore"]
    if name in own or len(rest) not in (1, 2) or "" in rest:
        known = ", ".join(own)
        raise UserError(f"scorer: {spec!r}; give MODEL:TAG or MODEL:FILE of open_clip, or one of {known}")
    if len(rest) == 2:
        return OpenClipScorer(name, rest[0], Path(rest[1])), CLIP_SCORE
    if Path(rest[0]).is_file() or "/" in rest[0]:
        return OpenClipScorer(name, weights=Path(rest[0])), CLIP_SCORE
    return OpenClipScorer(name, rest[0]), CLIP_SCORE


def _hpsv2_weights(given: list[str]) -> Path:
    """The local file, or the published one from the cache or the network."""
    from huggingface_hub import hf_hub_download

    if given:
        return Path(given[0])
    try:
        return Path(hf_hub_download(HPSV2_REPOSITORY, HPSV2_FILE))
    except Exception as error:  # the hub has errors of its own, the network others
        raise UserError(
            f"scorer hpsv2: {HPSV2_FILE} is neither in the cache nor reachable ({first_line(error)}); "
            "give hpsv2:FILE, a local copy"
        ) from None
