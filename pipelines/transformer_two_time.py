"""A diffusion transformer with two times; one file that diffusers loads with trust_remote_code=True."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn


class TwoTimeDiT(ModelMixin, ConfigMixin):
    """DiT (arXiv 2212.09748) whose one conditioning vector is emb(t) + emb(t - r) + emb(label) (arXiv 2505.13447).

    diffusers' DiTTransformer2DModel has a table of embeddings in every block and no way in for a second time; this one
    has the weights that the papers count. num_class_embeds: labels, one more row stands for none; null: no labels.
    norm_type: null for DiT's own; "non_scaling" for SampleNorm, which ties the network to its sample_size.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        num_class_embeds: int | None = 1000,
        norm_type: str | None = None,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.span_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds + 1, dim)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.norm_out: nn.Module = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)
        if norm_type is not None:
            self.change_norms(norm_type, ((sample_size // patch_size) ** 2, dim))
        self.initialise()

    def change_norms(self, norm_type: str, shape: tuple[int, int]) -> None:
        if norm_type != "non_scaling":
            raise ValueError(f"norm_type {norm_type!r} is none of a transformer's; it has non_scaling")
        for block in self.transformer_blocks:
            block.get_submodule("norm1").norm, block.norm2 = SampleNorm(shape), SampleNorm(shape)
        self.norm_out = SampleNorm(shape)

    @torch.no_grad()
    def initialise(self) -> None:
        """DiT's: Xavier in all layers but the embeddings (0.02); modulation and output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for embedding in (self.time_embedding, self.span_embedding):
            nn.init.normal_(embedding.linear_1.weight, std=0.02)
            nn.init.normal_(embedding.linear_2.weight, std=0.02)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        blocks = [block.norm1 for block in self.transformer_blocks if isinstance(block, Block)]
        for layer in (self.modulation_out, self.proj_out, *(norm.linear for norm in blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        span: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """hidden_states (B, C, H, W); timestep and span = timestep - r (B,), fractions, 0 where there is no r;
        class_labels (B,)."""
        span = torch.zeros_like(timestep) if span is None else span
        x = self.pos_embed(hidden_states)
        c = self.time_embedding(self.time_proj(timestep).to(x.dtype))
        c = c + self.span_embedding(self.time_proj(span).to(x.dtype))
        if self.class_embedding is not None:
            c = c + self.class_embedding(class_labels)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        shift, scale = self.modulation_out(nn.functional.silu(c)).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        p, channels = self.config.patch_size, self.config.in_channels
        rows, columns = hidden_states.shape[-2] // p, hidden_states.shape[-1] // p
        x = x.unflatten(1, (rows, columns)).unflatten(3, (p, p, channels))
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


class Block(nn.Module):
    """Self-attention and feed-forward layer, shifted, scaled and gated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = Attention(dim, heads=heads, dim_head=head_dim, bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y, gate, shift, scale, gate_ff = self.norm1(x, emb=c)
        x = x + gate[:, None] * self.attn(y)
        y = self.norm2(x) * (1 + scale[:, None]) + shift[:, None]
        return x + gate_ff[:, None] * self.ff(y)


class SampleNorm(nn.Module):
    """Non-scaling LayerNorm (arXiv 2502.01441): over all tokens and channels of a sample, with a bias for each."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.bias.shape, bias=self.bias, eps=1e-5)
