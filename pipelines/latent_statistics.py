"""Mean and deviation of the latents that a network was trained on; one file for trust_remote_code=True."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class LatentStatistics(ModelMixin, ConfigMixin):
    """Of each element of a latent. The network's samples are sigma_data (z - mean) / std (arXiv 2502.01441).

    mean, std  (C, h, w), of latents in the diffusion model's units, scaling_factor times the autoencoder's
    """

    mean: torch.Tensor
    std: torch.Tensor

    @register_to_config
    def __init__(self, shape: tuple[int, int, int], sigma_data: float = 0.5):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The latents z (B, C, h, w) of the network's samples."""
        return x * self.std / self.config.sigma_data + self.mean
