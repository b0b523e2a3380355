"""Trains the embedded teacher's AutoencoderKL (arXiv 2112.10752, section 3.1, without the adversarial part)."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ...pipelines.export import Export
from ..diffusion.draws import Draws
from ..training.contract import Batch, Method, Parts, Progress
from .settings import AutoencoderSettings


class Autoencoder(Method):
    Settings = AutoencoderSettings
    needs = frozenset({"images"})

    def __init__(self, settings: AutoencoderSettings, parts: Parts):
        super().__init__(settings, parts)
        levels = len(settings.block_out_channels)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.block_out_channels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=16,
            force_upcast=False,
        )

    def players(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"autoencoder": list(self.vae.parameters())}

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert batch.images is not None
        x = self.augment(batch.images, batch.draws)
        posterior = self.vae.encode(x).latent_dist
        eps = batch.draws.normal(posterior.mean.shape[1:])
        x_hat = self.vae.decode(posterior.mean + posterior.std * eps).sample
        error = (x_hat - x).float()
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        s = self.settings
        loss = s.l1_weight * l1 + s.l2_weight * l2 + s.kl_weight * kl
        return {"loss": loss, "l1": l1, "psnr": -10 * torch.log10(l2 / 4), "kl": kl}

    def augment(self, x: Tensor, draws: Draws) -> Tensor:
        """Mirror, shift by whole pixels over a repeated border, permute colours: per sample, (B, 3, H, W)."""
        m, (h, w) = self.settings.max_shift, x.shape[-2:]
        mirror, recolour = draws.uniform() < 0.5, draws.uniform() < self.settings.recolour
        dx, dy = draws.integers(0, 2 * m + 1).tolist(), draws.integers(0, 2 * m + 1).tolist()
        order = torch.stack([draws.uniform() for _ in range(3)], 1).argsort(1)
        padded = F.pad(x, (m, m, m, m), mode="replicate")
        rows = []
        for i, row in enumerate(padded):
            row = row[:, dy[i] : dy[i] + h, dx[i] : dx[i] + w]
            row = row.flip(-1) if mirror[i] else row
            rows.append(row[order[i]] if recolour[i] else row)
        return torch.stack(rows)

    def export(self) -> Export:
        return Export(self.vae)
