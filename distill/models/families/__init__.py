"""What differs between the latent pipelines of diffusers: network, prompts, sizes. One small class each."""
