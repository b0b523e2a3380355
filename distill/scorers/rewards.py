"""Rewards: how well pictures fit their captions, differentiable in the pictures."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .by_name import make_scorer
from .image_text import Scorer
from .picture_rule import PictureRule

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_REWARD = "image-reward"


class Reward(nn.Module):
    """(pictures (B, 3, H, W) in [0, 1], captions) -> (B,), larger is better; frozen, in float32.

    best   the largest value there is: best - reward is a cost that is never negative
    """

    best: float

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.score(images.float(), captions)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        """(B,) whose softmax over pictures of one caption says which is preferred. scale: of the model that learns."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Reward":
        """Stays in evaluation mode, also as a part of a method that is trained."""
        return super().train(False)


class ScorerReward(Reward):
    """The cosine of a frozen pair of encoders, unscaled; logits have its own temperature."""

    best = 1.0

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer.requires_grad_(False)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.scorer.similarity(images, captions)

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        return self.scorer.logit_scale * self(images, captions)


class ImageRewardReward(Reward):
    """-relu(2 - r), r of ImageReward (arXiv 2304.05977), as RG-LCD caps it: beyond 2 there is nothing to gain."""

    best = 0.0

    def __init__(self, model: Any):
        """`model`: what ImageReward.load gives."""
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.picture_rule = PictureRule(224, "shortest", "bicubic", CLIP_MEAN, CLIP_STD)

    @classmethod
    def load(cls) -> "ImageRewardReward":
        try:
            import ImageReward
        except ImportError as error:
            raise UserError(
                f"method.reward: {IMAGE_REWARD} needs the package image-reward, which cannot be imported ({error}); "
                "version 1.5 needs transformers 4; choose another reward beside transformers 5"
            ) from None
        return cls(ImageReward.load("ImageReward-v1.0", device="cpu"))

    def raw(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = self.model.blip.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(images.device)
        pictures = self.picture_rule(images)
        self.model.device = images.device  # where it makes its attention mask
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, pictures).squeeze(-1)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return capped(self.raw(images, captions))

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        return scale * self(images, captions)


def capped(r: Tensor) -> Tensor:
    return -F.relu(2 - r)


class UnloadedReward(Reward):
    """Stands for a reward where nothing is computed: a dry run."""

    best = 1.0

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError("no reward is loaded on the meta device")

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        return self(images, captions)


def load_reward(spec: str) -> Reward:
    """The reward of that name: image-reward, or a scorer as `make_scorer` names them."""
    if spec == IMAGE_REWARD:
        return ImageRewardReward.load()
    return ScorerReward(make_scorer(spec)[0])
