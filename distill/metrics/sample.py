"""A folder of pictures that a pipeline makes from the captions or classes of a data set: a data set in its turn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..checkpoint import write_file
from ..controls import Control
from ..errors import UserError
from .evaluate import choose_device, open_source
from .judges import DataJudge, inputs_for

SEED_BLOCK = 1000  # noise that no score of fewer seeds has seen


def sample(
    pipeline: str,
    output: Path,
    *,
    data: str = "emoji",
    split: str = "train",
    num_images: int,
    steps: int,
    seed_block: int = SEED_BLOCK,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    guidance_scale: float | None = None,
    data_options: Mapping[str, Any] | None = None,
    control: Control | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """00000.png and so on and metadata.jsonl in a new folder, which `load_data` and image tools read.

    Picture i is made as `evaluate` makes it: from the caption, class or condition of reference row i, with the noise
    seed seed_block * 1_000_000 + i. Raises UserError for whatever the caller can mend.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty; name a new folder")
    if num_images < 1 or batch_size < 1:
        raise UserError(f"num_images, batch_size: {num_images}, {batch_size}; give 1 or more")
    where = choose_device(device)
    source = open_source(pipeline, where, trust_remote_code)
    ((_, call),) = source.calls([steps], 1, guidance_scale, num_images).items()
    judge = DataJudge(data, split, None, "efflite0-128", where, batch_size, data_options)
    inputs = inputs_for(judge, source, num_images, control)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    with tqdm(total=num_images, unit="image", disable=not progress) as bar:
        for first in range(0, num_images, batch_size):
            rows = range(first, min(first + batch_size, num_images))
            images, _ = source.pictures(rows, inputs, seed_block, call)
            for i, image in zip(rows, images, strict=True):
                name = f"{i:05}.png"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(output / name)
                text = inputs.captions[i % len(inputs.captions)] if inputs.captions else ""
                lines.append(json.dumps({"file_name": name, "text": text}))
            bar.update(len(rows))
    write_file(output / "metadata.jsonl", "\n".join(lines) + "\n")
    return output
