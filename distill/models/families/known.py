"""The list of families, and the one that a pipeline belongs to."""

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)

from .base import Family
from .flows import Flux, StableDiffusion3, Wan
from .unets import LatentConsistency, StableDiffusion, StableDiffusionXL

FAMILIES: dict[type[DiffusionPipeline], type[Family]] = {
    StableDiffusionPipeline: StableDiffusion,
    LatentConsistencyModelPipeline: LatentConsistency,
    StableDiffusionXLPipeline: StableDiffusionXL,
    StableDiffusion3Pipeline: StableDiffusion3,
    FluxPipeline: Flux,
    WanPipeline: Wan,
}
FAMILY_NAMES: tuple[str, ...] = tuple(cls.__name__ for cls in FAMILIES)


def family_of(pipeline: Any) -> Family | None:
    """None for a pipeline class without one."""
    return next((family(pipeline) for cls, family in FAMILIES.items() if isinstance(pipeline, cls)), None)
