"""Latents of mean 0 and one standard deviation in every element (arXiv 2502.01441)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.cache import LatentCache
from ...diffusion.condition import Condition
from ...models.codec import Codec
from ...training.contract import Batch
from ..space import Space


class Statistics(nn.Module):
    """x0 = sigma_data (z - mean) / std, of each element over the training set; buffers, so that checkpoints carry them.

    mean, std (C, h, w) of z, a latent in the diffusion model's units; 0 and 1 before `measure`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Sequence[int], sigma_data: float):
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("std", torch.ones(*shape))

    def normalised(self, z: Tensor) -> Tensor:
        return self.sigma_data * (z - self.mean) / self.std

    def restored(self, x0: Tensor) -> Tensor:
        return x0 * self.std / self.sigma_data + self.mean

    def measure(self, latents: LatentCache, codec: Codec, batch_size: int = 1024) -> None:
        """From the cached posteriors, as if each latent were drawn from its own infinitely often.

        The variance of z is that of the posteriors' means and the mean of their variances, combined batch by batch in
        float64 (Chan et al. 1979).
        """
        count, mean = 0, torch.zeros(self.mean.shape, dtype=torch.float64)
        spread, noise = torch.zeros_like(mean), torch.zeros_like(mean)
        for start in range(0, len(latents), batch_size):
            rows = range(start, min(start + batch_size, len(latents)))
            centre, logvar = latents[rows].double().chunk(2, dim=1)
            total = count + len(rows)
            step = centre.mean(0) - mean
            spread = spread + (centre - centre.mean(0)).square().sum(0) + step**2 * count * len(rows) / total
            noise = noise + logvar.exp().sum(0)
            mean, count = mean + step * len(rows) / total, total
        origin = codec.unscaled(torch.zeros(1, *self.mean.shape).double())[0]
        unit = codec.unscaled(torch.ones(1, *self.mean.shape).double())[0] - origin
        self.mean.copy_((mean - origin) / unit)
        self.std.copy_(((spread + noise) / count).sqrt() / unit)


class NormalisedLatents(Space):
    """The samples of another space of latents, normalised."""

    def __init__(self, inner: Space, statistics: Statistics):
        self.inner, self.statistics = inner, statistics
        self.shape, self.needs = inner.shape, inner.needs

    def samples(self, batch: Batch) -> Tensor:
        return self.statistics.normalised(self.inner.samples(batch))

    def condition(self, captions: Sequence[str]) -> Condition:
        return self.inner.condition(captions)

    def inputs(self, captions: Sequence[str]) -> dict[str, Any]:
        return self.inner.inputs(captions)

    def told(self, batch: Batch) -> Condition:
        return self.inner.told(batch)

    def decode(self, x0: Tensor) -> Tensor:
        return self.inner.decode(self.statistics.restored(x0))
