"""Captioned images, the order in which training sees them, and caches of what an encoder made of them."""
