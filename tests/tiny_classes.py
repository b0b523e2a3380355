"""Pipelines of random weights that know classes, and a data set with classes in memory."""

from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from fewstep.distill.data.images import MemoryImages
from fewstep.distill.errors import UserError

CLASSES = ("red cat", "dog", "cat")


def tiny_unet(channels: int = 3, classes: int | None = None) -> UNet2DModel:
    """16 px, 8 channels, random weights; a class moves its pictures by more than their rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=2,
            num_class_embeds=classes,
        )
        if classes is not None:
            torch.nn.init.normal_(unet.class_embedding.weight, std=20.0)
        torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    return unet


def consistency_folder(folder: Path, channels: int = 3, classes: int | None = None) -> Path:
    """What ConsistencyModelPipeline loads."""
    ConsistencyModelPipeline(
        tiny_unet(channels, classes), CMStochasticIterativeScheduler(sigma_max=2.0)
    ).save_pretrained(folder)
    return folder


def class_data(name: str, *, split: str, resolution: int, **_: Any) -> MemoryImages:
    """In the place of load_data: 7 pictures of train, 5 of holdout, of the classes in turn; "plain" has no classes."""
    if split not in ("train", "holdout"):
        raise UserError(f"{name}: has no split {split!r}")
    count, seed = (7, 1) if split == "train" else (5, 2)
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
    names = [CLASSES[i % 3] for i in range(count)]
    rows = [{"category": name} for name in names]
    classes = () if name == "plain" else CLASSES
    return MemoryImages(pixels, names, rows, resolution=resolution, classes=classes)
