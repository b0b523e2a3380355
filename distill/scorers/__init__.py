"""Networks that look at pictures: as metric, as reward, as perceptual loss."""
