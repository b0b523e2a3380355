"""Scorers that are open_clip models, by name and pretrained tag or weights file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.nearest import hint
from ..errors import UserError, first_line
from ..metrics.lite import hash_file
from .image_text import CLIP_SCORE, CLIP_SCORE_HESSEL, COSINE, Measure, Scorer
from .picture_rule import PictureRule


class OpenClipScorer(Scorer):
    """An open_clip model in float32 (pip install open_clip_torch).

    model       open_clip's name of the architecture, for example "ViT-B-32"
    pretrained  open_clip's tag of the weights, which also sets preprocessing and QuickGELU; None: weights alone
    weights     a local copy of the tag's file, or any checkpoint of that architecture
    prefix      put before every text, separated by a space
    fit, lanczos  override of the picture rule (see PictureRule)

    Texts longer than the model's context are cut by open_clip's own tokenizer, which keeps the end token. Pictures
    follow open_clip's configuration of the model, applied to tensors by PictureRule instead of PIL. A tag that was
    trained with QuickGELU runs with QuickGELU whether or not the architecture's name says so; weights without a tag
    run as the architecture's name says; the protocol records it.
    Raises UserError for an unknown name or tag, and for weights that are missing, unreadable or do not fit.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        weights: Path | None = None,
        *,
        name: str | None = None,
        prefix: str = "",
        fit: str | None = None,
        lanczos: int | None = None,
    ):
        super().__init__()
        import open_clip

        config = open_clip.get_model_config(model)
        if config is None:
            raise UserError(
                f"scorer {model}: no such open_clip model; {hint(model, open_clip.list_models())}"
            )
        tag = _tag(model, pretrained)
        quick = bool(config.get("quick_gelu", False) or tag.get("quick_gelu", False))
        path = _weights_file(model, pretrained, tag, weights)
        self.weights_sha256 = hash_file(path)
        try:
            network = open_clip.create_model(
                model, str(path), force_quick_gelu=quick, force_preprocess_cfg=tag or None
            )
        except Exception as error:  # open_clip passes on whatever the unpickler and load_state_dict raise
            raise UserError(
                f"scorer {model}: weights {path} do not fit ({first_line(error)}); give this model's checkpoint"
            ) from None
        try:
            self.tokenizer: Any = open_clip.get_tokenizer(model)
        except Exception as error:  # a hub tokenizer that is not in the cache
            raise UserError(
                f"scorer {model}: no tokenizer ({first_line(error)}); load it once with a network, or take a model "
                "with CLIP's own tokenizer"
            ) from None
        self.picture_rule = _picture_rule(model, network.visual.preprocess_cfg, fit, lanczos)
        self.prefix = f"{prefix.strip()} " if prefix else ""
        self.name = name or f"{model}-{pretrained or self.weights_sha256[:12]}"
        tokenizer = type(self.tokenizer).__name__
        text = f"{tokenizer}, {self.tokenizer.context_length} tokens, prefix {self.prefix!r}"
        structure = {**config, "quick_gelu": quick}
        digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()
        self.text_rule = f"{text}; {model}{', QuickGELU' if quick else ''}, architecture {digest[:12]}"
        self.network: Any = network.float().requires_grad_(False)
        self.eval()
        self.num_features = self.text_vectors([""]).shape[1]

    def image_vectors(self, pictures: Tensor) -> Tensor:
        return self.network.encode_image(pictures)

    @torch.no_grad()
    def text_vectors(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer([self.prefix + text for text in texts])
        return self.network.encode_text(tokens.to(self.device))


@dataclass(frozen=True)
class Preset:
    """A scorer and a measure as a paper or library names them (methods of section 6 in the docstring of PRESETS)."""

    model: str
    pretrained: str
    measure: Measure
    prefix: str = ""
    fit: str | None = None
    lanczos: int | None = None

    def load(self, name: str, weights: Path | None = None) -> OpenClipScorer:
        """The scorer. `weights`: a local copy of the tag's file."""
        return OpenClipScorer(
            self.model, self.pretrained, weights,
            name=name, prefix=self.prefix, fit=self.fit, lanczos=self.lanczos,
        )  # fmt: skip


PRESETS = {
    # torchmetrics' default CLIPScore; it loads the same weights through transformers
    "clip-vit-l-14-openai": Preset("ViT-L-14-quickgelu", "openai", CLIP_SCORE),
    # arXiv 2104.08718: ViT-B/32, prefix, 2.5 * max(cos, 0)
    "clipscore-vit-b-32-openai": Preset("ViT-B-32-quickgelu", "openai", CLIP_SCORE_HESSEL, "A photo depicts"),
    # DMD and DMD2's "ViT-G/14", which is ViT-g-14: tianweiy/DMD2, main/coco_eval/coco_evaluator.py
    "dmd2-vit-g-14": Preset("ViT-g-14", "laion2b_s12b_b42k", COSINE, "A photo depicts", lanczos=256),
    # RG-LCD's CLIP reward: the whole picture is squeezed into the square
    "clip-vit-h-14-laion2b": Preset("ViT-H-14", "laion2b_s32b_b79k", COSINE, fit="squash"),
}


def _tag(model: str, pretrained: str | None) -> dict[str, Any]:
    """open_clip's configuration of a tag; empty without a tag."""
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    if pretrained is None:
        return {}
    tag = get_pretrained_cfg(model, pretrained)
    if not tag:
        known = ", ".join(list_pretrained_tags_by_model(model)) or "none: give a weights file"
        raise UserError(f"scorer {model}: no pretrained tag {pretrained!r}; open_clip has {known}")
    return tag


def _weights_file(model: str, pretrained: str | None, tag: dict[str, Any], weights: Path | None) -> Path:
    """The local file, or the tag's file from the cache or the network."""
    from open_clip import download_pretrained

    if weights is not None:
        if not weights.is_file():
            raise UserError(f"scorer {model}: {weights}: no such weights file; give an open_clip checkpoint")
        return weights
    if pretrained is None:
        raise UserError(f"scorer {model}: which weights? give a pretrained tag or a weights file")
    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # each of the download libraries has its own errors
        raise UserError(
            f"scorer {model}, tag {pretrained}: weights neither in the cache nor reachable ({first_line(error)}); "
            "give the path of a local copy"
        ) from None


def _picture_rule(model: str, config: dict[str, Any], fit: str | None, lanczos: int | None) -> PictureRule:
    """open_clip's preprocessing configuration as a rule. Raises UserError for one that is not followed here."""
    size = config["size"]
    side, other = size if isinstance(size, (tuple, list)) else (size, size)
    fit = fit or config["resize_mode"]
    if side != other or fit not in ("shortest", "squash"):
        raise UserError(
            f"scorer {model}: pictures of {side}x{other} px, resize {fit}; square ones, shortest or squash, are known"
        )
    return PictureRule(
        side,
        "squash" if fit == "squash" else "shortest",
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
        lanczos,
    )
