"""A pipeline and the calls that its export names, from a folder or the hub."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from diffusers import DiffusionPipeline
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from pydantic import StringConstraints

from ..data.cache import cache_directory
from ..errors import UserError, first_line
from ..models.weight_files import only_variant
from ..readers import check_finite, read_json
from .remote_code import may_run

SAMPLING, REMEDY = "sampling.json", "export the pipeline again"
Steps = Annotated[str, StringConstraints(pattern=r"^(default|[1-9][0-9]*)$")]
Sampling = Annotated[dict[Steps, dict[str, Any]], MinLen(1)]


def load_pipeline(pipeline: str, trust_remote_code: bool) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The pipeline of a folder or hub id in float32, and its sampling.json, {} without.

    Raises UserError if it cannot be loaded, or runs code that is neither ours nor trusted.
    """
    local = Path(pipeline).is_dir()
    trust = may_run(Path(pipeline), trust_remote_code) if local else trust_remote_code
    try:
        with _one_at_a_time() if trust else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(
                pipeline,
                local_files_only=local,
                dtype=torch.float32,
                trust_remote_code=trust,
                variant=only_variant(Path(pipeline)) if local else None,
            )
    except Exception as error:  # whatever diffusers, transformers or safetensors say about these files
        if not trust and "trust_remote_code" in str(error):
            raise UserError(
                f"{pipeline}: runs code of its own; read it, and give --trust_remote_code if you trust it"
            ) from None
        remedy = "complete the folder" if local else "no such folder here; check the spelling and the network"
        raise UserError(
            f"{pipeline}: cannot be loaded as a pipeline ({first_line(error)}); {remedy}"
        ) from None
    if getattr(pipe, "scheduler", None) is None:
        raise UserError(
            f"{pipeline}: the pipeline has no scheduler; add a scheduler folder and name it in model_index"
        )
    path = Path(pipeline) / SAMPLING if local else _sampling_of_hub(pipeline)
    return pipe, read_sampling(path) if path and path.exists() else {}


def _one_at_a_time() -> FileLock:
    """diffusers copies a pipeline's code to one place before it reads it there, in every process of a launch."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_directory() / "remote_code.lock")


def _sampling_of_hub(repository: str) -> Path | None:
    try:
        return Path(hf_hub_download(repository, SAMPLING))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository}: no network to ask for its sampling.json; give the folder of its snapshot"
        ) from None
    except EntryNotFoundError:
        return None


def read_sampling(path: Path) -> dict[str, dict[str, Any]]:
    """sampling.json: call arguments by number of steps, or "default". Raises UserError for anything else."""
    try:
        sampling: dict[str, dict[str, Any]] = read_json(path, Sampling, remedy=REMEDY)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: {REMEDY}") from None
    check_finite(sampling, path, remedy=REMEDY)
    return sampling
