"""Captioned images, the order in which training sees them, and caches of what an encoder made of them."""

from .cache import LatentCache, PromptCache, SampledLatents, cache_directory
from .images import ImageData
from .sampler import rows_of
from .sources import load_data, other_split

__all__ = [
    "ImageData",
    "LatentCache",
    "PromptCache",
    "SampledLatents",
    "cache_directory",
    "load_data",
    "other_split",
    "rows_of",
]
