"""PickScore (arXiv 2305.01569): a CLIP of transformers, fine-tuned on people's choices."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line
from .image_text import Scorer
from .picture_rule import PictureRule

PICKSCORE = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PickScore(Scorer):
    """transformers' CLIPModel and its tokenizer, in float32; 77 tokens at most.

    path  a folder with both; None: the published weights and the tokenizer that goes with them, from the hub's cache
    Raises UserError for weights or a tokenizer that are missing or unreadable.
    """

    def __init__(self, path: str | None = None):
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        try:
            model = CLIPModel.from_pretrained(path or PICKSCORE, dtype=torch.float32)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path or TOKENIZER)
        except Exception as error:  # transformers, the hub and safetensors each have their own
            raise UserError(
                f"scorer pickscore: no weights or tokenizer ({first_line(error)}); load {PICKSCORE} and "
                f"{TOKENIZER} once with a network, or give pickscore:FOLDER with both"
            ) from None
        self.network: Any = model.requires_grad_(False)
        vision = model.config.vision_config
        self.picture_rule = PictureRule(vision.image_size, "shortest", "bicubic", CLIP_MEAN, CLIP_STD)
        self.name, self.num_features = "pickscore", model.config.projection_dim
        self.text_rule = f"{type(self.tokenizer).__name__}, 77 tokens, padded to the longest; CLIPModel"
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        self.weights_sha256 = digest.hexdigest()
        self.eval()

    def image_vectors(self, pictures: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixel_values=pictures).pooler_output)

    @torch.no_grad()
    def text_vectors(self, texts: list[str]) -> Tensor:
        length = min(77, self.network.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        seen = self.network.text_model(**tokens.to(self.device))
        return self.network.text_projection(seen.pooler_output)
