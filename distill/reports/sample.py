"""A folder of pictures that a pipeline makes from the captions or classes of a data set, or from prompts: a data set in
its turn."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.prompts import read_prompts
from ..errors import UserError
from ..methods.control.controls import Control
from ..metrics.protocol import hash_prompts
from ..readers import Unreadable, read_json
from ..training.run_lock import LOCK, locked
from ..writers import write_bytes, write_file
from .inputs import Inputs
from .judges import DataJudge, inputs_for
from .opening import choose_device, open_source
from .pipeline_source import SEED_STRIDE

SEED_BLOCK = 1000  # noise that no score of fewer seeds has seen
SEED_BLOCKS = 2**63 // SEED_STRIDE - 1_000_000  # torch's seeds have 64 bits
NUM_IMAGES = 500
RECORD = "sample.json"


def sample(
    pipeline: str,
    output: Path,
    *,
    data: str = "emoji",
    split: str = "train",
    prompts: str | None = None,
    num_images: int | None = None,
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
    """00000.png and so on and metadata.jsonl in `output`, which `load_data` and image tools read.

    Picture i is made as `evaluate` makes it: from the caption, class or condition of reference row i, or from line i of
    the text file `prompts`, repeated if there are fewer, with the noise seed seed_block * 1_000_000 + i. num_images: by
    default one for each prompt, else 500. The same call goes on where it was stopped; sample.json says what it was.
    Raises UserError for whatever the caller can mend.
    """
    where = choose_device(device)
    source = open_source(pipeline, where, trust_remote_code)
    if prompts is None:
        count = NUM_IMAGES if num_images is None else num_images
        judge = DataJudge(data, split, None, "efflite0-128", where, batch_size, data_options)
        inputs = inputs_for(judge, source, count, control)
    else:
        if source.conditioning != "caption":
            raise UserError(f"prompts: {pipeline} takes none; leave the flag out")
        if source.controlled or control is not None:
            raise UserError("prompts: a control needs pictures beside them; give --data in its place")
        inputs = Inputs.of_captions(read_prompts(prompts))
        count = len(inputs.captions) if num_images is None else num_images
    if not 0 <= seed_block <= SEED_BLOCKS:
        raise UserError(f"seed_block: {seed_block}; give 0 to {SEED_BLOCKS}")
    if count < 1 or batch_size < 1:
        raise UserError(f"num_images, batch_size: {count}, {batch_size}; give 1 or more")
    ((_, call),) = source.calls([steps], 1, guidance_scale, count).items()
    conditions = [] if inputs.conditions is None else [inputs.conditions.identity(range(count))]
    record = {
        **source.describe(),
        "arguments": call,
        "num_images": count,
        "seed_rule": source.seed_rule,
        "seed_block": seed_block,
        "inputs_sha256": [hash_prompts(inputs.of(range(count))), *conditions],
    }
    note = json.dumps(record, indent=2) + "\n"
    with locked(output, "output"), tqdm(total=count, unit="image", disable=not progress) as bar:
        _check_claim(output, record)
        for first in range(0, count, batch_size):
            rows = range(first, min(first + batch_size, count))
            if not all((output / _name(i)).is_file() for i in rows):
                images, _ = source.pictures(rows, inputs, seed_block, call)
                write_file(output / RECORD, note, "output")
                for i, image in zip(rows, images, strict=True):
                    _save(Image.fromarray(image.permute(1, 2, 0).numpy()), output / _name(i))
            bar.update(len(rows))
        told = [inputs.captions[i % len(inputs.captions)] if inputs.captions else "" for i in range(count)]
        lines = [json.dumps({"file_name": _name(i), "text": text}) for i, text in enumerate(told)]
        write_file(output / "metadata.jsonl", "\n".join(lines) + "\n", "output")
    return output


def _check_claim(output: Path, record: dict[str, Any]) -> None:
    """Refuses a folder that holds anything but pictures of the same call, or its note without a picture."""
    held = {p.name for p in output.iterdir()} - {LOCK, RECORD, f".{RECORD}.partial"}
    note = output / RECORD
    if held and not (note.is_file() and _same(note, record)):
        raise UserError(
            f"output: {output} holds other files or the pictures of another call; name a new folder"
        )


def _same(note: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(read_json(note) == json.loads(json.dumps(record)))
    except Unreadable:
        return False


def _name(i: int) -> str:
    return f"{i:05}.png"


def _save(image: Image.Image, file: Path) -> None:
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_bytes(file, data.getvalue(), "output")
