"""The latent proxy reward model of RG-LCD (arXiv 2403.11027): a CLIP of latents that learns an expert's preferences."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .settings import LRMSettings

MAX_LOGIT_SCALE = 100.0


class LatentReward(nn.Module):
    """(latents (B, C, h, w) in the autoencoder's units, text states (B, L, D)) -> cosine (B,)."""

    def __init__(self, shape: tuple[int, int, int], text_width: int, s: LRMSettings):
        super().__init__()
        from open_clip.transformer import Transformer, VisionTransformer

        channels, side, _ = shape
        if side % s.patch_size:
            raise UserError(f"method.lrm.patch_size: {s.patch_size} does not divide the latents' side {side}")
        if s.vision_width % s.vision_heads:
            raise UserError(
                f"method.lrm.vision_heads: {s.vision_heads} does not divide vision_width {s.vision_width}"
            )
        width = s.vision_width
        self.vision = VisionTransformer(
            side, s.patch_size, width, s.vision_layers, s.vision_heads, 4.0, output_dim=s.embed_dim
        )
        self.vision.conv1 = nn.Conv2d(channels, width, s.patch_size, s.patch_size, bias=False)
        self.token = nn.Parameter(torch.randn(text_width) * text_width**-0.5)
        self.text = Transformer(text_width, s.text_layers, max(text_width // 64, 1))
        self.text_norm = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, s.embed_dim) * text_width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.unlocked_vision_layers = s.unlocked_vision_layers

    @property
    def scale(self) -> Tensor:
        """What makes logits of cosines, at most 100."""
        return self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()

    def image_vectors(self, latents: Tensor) -> Tensor:
        return F.normalize(self.vision(latents.float()).float(), dim=-1)

    def text_vectors(self, states: Tensor) -> Tensor:
        first = self.token.expand(len(states), 1, -1)
        read = self.text(torch.cat([first, states.float()], dim=1))[:, 0]
        return F.normalize((self.text_norm(read) @ self.text_projection).float(), dim=-1)

    def forward(self, latents: Tensor, states: Tensor) -> Tensor:
        return (self.image_vectors(latents) * self.text_vectors(states)).sum(1)

    def locked(self) -> list[nn.Parameter]:
        """What matching leaves as it is: the ViT but for its last blocks, its last norm and its projection."""
        blocks = self.vision.transformer.resblocks
        first_free = len(blocks) - self.unlocked_vision_layers
        free = [*blocks[first_free:].parameters(), *self.vision.ln_post.parameters(), self.vision.proj]
        held = {id(p) for p in free}
        return [p for p in self.vision.parameters() if id(p) not in held]

    def unlocked(self) -> list[nn.Parameter]:
        held = {id(p) for p in self.locked()}
        return [p for p in self.parameters() if id(p) not in held]


def preference_loss(expert: Tensor, latent: Tensor, smooth: bool = False) -> Tensor:
    """sum over pairs of mean_b KL(softmax(E_i, E_j) || softmax(l_i, l_j)) of logits (3, B).

    Rows: prediction, target, real latents. `smooth`: where the expert prefers a generated one to the real one, its
    preference becomes (1/2, 1/2).
    """
    total = latent.new_zeros(())
    for i, j in combinations(range(len(expert)), 2):
        wanted = F.softmax(torch.stack([expert[i], expert[j]]), dim=0)
        if smooth and j == 2:
            wanted = torch.where(wanted[0] > wanted[1], torch.full_like(wanted, 0.5), wanted)
        given = F.log_softmax(torch.stack([latent[i], latent[j]]), dim=0)
        total = total + F.kl_div(given, wanted, reduction="none").sum(0).mean()
    return total


def pair_accuracy(expert: Tensor, latent: Tensor) -> Tensor:
    """Share of the pairs of (3, B) that both order alike."""
    agree = [
        ((expert[i] > expert[j]) == (latent[i] > latent[j])).float()
        for i, j in combinations(range(len(expert)), 2)
    ]
    return torch.stack(agree).mean()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, captions: list[str]) -> Tensor:
    """Symmetric cross entropy of all pairs (arXiv 2103.00020); rows of one caption are no negatives of each other."""
    logits = scale * images @ texts.T
    same = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device)
    own = torch.eye(len(captions), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same & ~own, float("-inf"))
    right = torch.arange(len(captions), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
