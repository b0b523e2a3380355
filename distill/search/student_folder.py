"""The student that a search starts from: its pipeline, and the run that made it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..config.search import StudentFolder
from ..errors import UserError
from ..models.lora_files import fuse_lora
from ..models.stock_schedulers import exchanged
from ..models.weight_files import only_variant
from ..teachers import EMBEDDED
from ..writers import write_folder


@dataclass(frozen=True)
class StudentFiles:
    """pipeline: its folder; run: the run's, None where there is none."""

    pipeline: Path
    run: Path | None

    @classmethod
    def find(cls, student: StudentFolder, search: Path) -> "StudentFiles":
        """The student's own folder, downloaded if it is a hub id; with a LoRA or another scheduler in `search`/student.

        Raises UserError where there is none, or it cannot be fetched.
        """
        found = located(student.path)
        if found is None:
            found = cls(downloaded(student.path), None)
        if student.lora is None and student.scheduler is None:
            return found
        made = search / "student"
        if not made.is_dir():
            pipeline = adapted(found.pipeline, student)
            write_folder(made, lambda folder: pipeline.save_pretrained(folder, safe_serialization=True))
        return cls(made, None)


def located(path: str) -> StudentFiles | None:
    """A run folder, a pipeline folder or an embedded teacher; None for a hub id. UserError for anything else."""
    folder = EMBEDDED.get(path, Path(path).expanduser())
    if (folder / "pipeline" / "model_index.json").is_file():
        return StudentFiles(folder / "pipeline", folder)
    if (folder / "model_index.json").is_file():
        run = folder.parent if (folder.parent / "config.yaml").is_file() else None
        return StudentFiles(folder, run)
    if folder.is_dir():
        raise UserError(f"student.path: {path} holds no pipeline; finish the run, or give a pipeline folder")
    if path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):
        raise UserError(
            f"student.path: no folder {path}; make the student first, by the command in the configuration's head, or "
            "give a pipeline folder or a hub id"
        )
    return None


def downloaded(path: str) -> Path:
    try:
        return Path(DiffusionPipeline.download(path))
    except Exception as error:  # the hub has errors of its own, the network others
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"student.path: {path} could not be fetched from the hub ({reason}); check the name and the network, "
            "or give a local pipeline folder"
        ) from error


def adapted(folder: Path, student: StudentFolder) -> Any:
    """The pipeline with the LoRA in its weights and the scheduler in place of its own. UserError if they do not fit."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, variant=only_variant(folder))
    if student.lora is not None:
        fuse_lora(pipe, student.lora, key="student.lora")
    if student.scheduler is not None:
        kind = getattr(diffusers, student.scheduler, None)
        if kind is None or not student.scheduler.endswith("Scheduler"):
            raise UserError(
                f"student.scheduler: diffusers has no {student.scheduler!r}; name one of its schedulers"
            )
        pipe.scheduler = exchanged(pipe.scheduler, kind, timestep_spacing="trailing")
    return pipe
