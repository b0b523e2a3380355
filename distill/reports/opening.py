"""What is scored, and where: a source of pictures, a device, counts that make sense."""

import os
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import UserError, first_line
from ..metrics.extractor import Extractor
from ..teachers import EMBEDDED
from .folder_source import FolderSource
from .generation import Made
from .inputs import Inputs
from .pipeline_source import SEED_STRIDE, PipelineSource
from .scoring import Setting
from .source import Source
from .trained_on import check_place


def open_source(
    pipeline: str, device: torch.device, trust_remote_code: bool = False, center_crop: bool = True
) -> Source:
    """An embedded teacher, a pipeline folder, a folder of images or a hub id; of pipelines also `PIPELINE+LORA`, with
    the LoRA of a file in the weights. `center_crop`: how a folder's images become squares, as of load_data. Raises
    UserError if it is none."""
    check_place(pipeline)
    lora = None
    if not Path(pipeline).exists() and "+" in pipeline:
        pipeline, _, lora = pipeline.partition("+")
    path = EMBEDDED.get(pipeline, Path(pipeline))
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return PipelineSource(str(path), device, lora=lora, trust_remote_code=trust_remote_code)
        if (path / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{path}: this is a run folder; give {path / 'pipeline'}")
        if lora is not None:
            raise UserError(f"{pipeline}+{lora}: a folder of images takes no LoRA; give a pipeline")
        return FolderSource(path, center_crop)
    return PipelineSource(pipeline, device, lora=lora, trust_remote_code=trust_remote_code)


def setting_of(
    source: Source, network: Extractor, n_gen: int, inputs: Inputs, made: Made, crop_rule: str = "none"
) -> Setting:
    grey = "; grey repeated to RGB" if made.grey else ""
    crop = "" if crop_rule == "none" else f"; crop: {crop_rule}"
    rule = source.quantisation + grey + crop
    return Setting(network, n_gen, inputs, source.seed_rule, rule, made.side)


def check_counts(num_images: int, seeds: int, batch_size: int) -> None:
    if not 2 <= num_images <= SEED_STRIDE:
        raise UserError(f"num_images: {num_images}; give 2 to {SEED_STRIDE}")
    for name, value in (("seeds", seeds), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")


def place_of(device: torch.device | str | None) -> tuple[torch.device, int, int]:
    """The device, rank and number of processes; one process for each device under a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose_device(device), 0, 1
    state = PartialState(cpu=device is not None and torch.device(device).type == "cpu")
    return state.device, state.process_index, state.num_processes


def choose_device(device: torch.device | str | None) -> torch.device:
    """None: cuda if there is one, else cpu. Raises UserError for one that cannot be used here."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device}: not usable here ({first_line(error)}); leave it out or use cpu"
        ) from None
    return where
