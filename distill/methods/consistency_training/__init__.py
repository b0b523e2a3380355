"""iCT, CT, CD, ECT and latent consistency training."""
