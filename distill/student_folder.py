"""The student that a search starts from: its pipeline, and the run that made it."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from .errors import UserError
from .teacher import EMBEDDED


@dataclass(frozen=True)
class StudentFiles:
    """pipeline: its folder; run: the run's, None where there is none."""

    pipeline: Path
    run: Path | None

    @classmethod
    def find(cls, path: str) -> "StudentFiles":
        """Of a run folder, a pipeline folder, an embedded teacher or a hub id, which is downloaded."""
        folder = EMBEDDED.get(path, Path(path).expanduser())
        if (folder / "pipeline" / "model_index.json").is_file():
            return cls(folder / "pipeline", folder)
        if (folder / "model_index.json").is_file():
            run = folder.parent if (folder.parent / "config.yaml").is_file() else None
            return cls(folder, run)
        if folder.is_dir():
            raise UserError(
                f"student.path: {path} holds no pipeline; finish the run, or give a pipeline folder"
            )
        if not is_hub_id(path):
            raise UserError(
                f"student.path: no folder {path}; train the student first, see the configuration's head, or give a "
                "pipeline folder or a hub id"
            )
        try:
            return cls(Path(DiffusionPipeline.download(path)), None)
        except Exception as error:  # the hub has errors of its own, the network others
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"student.path: {path} could not be fetched from the hub ({reason}); check the name and the network, "
                "or give a local pipeline folder"
            ) from error


def is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~", "runs/"))
