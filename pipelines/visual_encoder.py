"""A picture's tokens in place of text (InterLCM, arXiv 2502.02215); one file for trust_remote_code=True."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class VisualEncoder(ModelMixin, ConfigMixin):
    """An image network's tokens (B, in_tokens, D) to those of a text encoder (B, out_tokens, out_width).

    A convolutional network in one dimension, whose channels are the tokens and whose length is their width. With n =
    len(channels) the length goes D, out_width / n, 2 out_width / n, ..., out_width, the channels inwards from their
    last. Attention stands in the middle and on the first level. The defaults are the released code's: CLIP ViT-B/16 to
    the text encoder of Stable Diffusion 1.5, 12,960,845 parameters.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_tokens: int = 197,
        out_tokens: int = 77,
        out_width: int = 768,
        channels: Sequence[int] = (128, 256, 512),
        blocks_per_level: int = 2,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        groups, width, levels = norm_num_groups, channels[-1], len(channels)
        layers: list[nn.Module] = [
            nn.Conv1d(in_tokens, width, 3, padding=1),
            Resize(width, out_width // levels),
            ResBlock(width, width, groups),
            Attention(width, groups),
            ResBlock(width, width, groups),
        ]
        for level, out in enumerate(reversed(channels), start=1):
            for _ in range(blocks_per_level):
                layers.append(ResBlock(width, out, groups))
                width = out
                if level == 1:
                    layers.append(Attention(width, groups))
            if level < levels:
                layers.append(Resize(width, out_width * (level + 1) // levels))
        layers += [nn.GroupNorm(groups, width, eps=1e-6), nn.Conv1d(width, out_tokens, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
        return x


class Resize(nn.Module):
    """To another length by the nearest elements, then a convolution."""

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.length, self.conv = length, nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, self.length, mode="nearest"))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv1d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Of one head among the places of the length."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).mT for layer in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).mT)
