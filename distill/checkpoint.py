"""Atomic checkpoints: a folder appears whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .readers import read_json, read_objects, read_tensors

STATE, OPTIMISERS, PROGRESS = "state.safetensors", "optimizers.pt", "progress.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write that fails within becomes one line that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(" (os error")[0]
        raise UserError(
            f"output_dir: {path} could not be written ({reason}); "
            "free space or choose another --output_dir; what was saved before is intact"
        ) from error


def save_objects(value: Any, path: Path) -> None:
    """torch.save, which reports a full disk as "unexpected pos": here it is the OSError of the write."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else error from None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Run `fill` on a scratch folder beside `folder`, then put it in place in one rename."""
    scratch = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            fill(scratch)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                scratch.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def write_file(path: Path, text: str) -> None:
    """Replace a small text file in one rename."""
    scratch = path.with_name(f".{path.name}.partial")
    with writing(path):
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)


def kept_state(method: nn.Module) -> dict[str, Tensor]:
    """What a method's checkpoint holds: trained parameters and persistent buffers, contiguous, by name.

    A network that two submodules share appears once, under its first name.
    """
    kept = {k for k, p in method.named_parameters() if p.requires_grad}
    kept |= {k for k, _ in method.named_buffers()}
    return {k: v.detach().contiguous() for k, v in method.state_dict().items() if k in kept}


def restore_state(method: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    expected = kept_state(method)
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())[:3]
        raise UserError(
            f"resume_from_checkpoint: {source} is of another model (differs in {', '.join(odd)}); "
            "choose another --output_dir"
        )
    try:
        method.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"resume_from_checkpoint: {source} is of another model ({reason}); choose another --output_dir"
        ) from error


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


class Checkpoints:
    """checkpoint-<step> folders of one run, at most `limit` of them."""

    def __init__(self, run: Path, limit: int | None):
        self.run, self.limit = run, limit

    def steps(self) -> list[int]:
        found = (CHECKPOINT.fullmatch(p.name) for p in self.run.glob("checkpoint-*"))
        return sorted(int(m[1]) for m in found if m)

    def folder(self, step: int) -> Path:
        return self.run / f"checkpoint-{step}"

    def save(self, step: int, state: dict[str, Tensor], optimisers: Any, progress: dict[str, Any]) -> None:
        def fill(folder: Path) -> None:
            save_file(state, folder / STATE)
            save_objects(optimisers, folder / OPTIMISERS)
            (folder / PROGRESS).write_text(json.dumps(progress))

        write_folder(self.folder(step), fill)
        if self.limit is not None:
            for old in self.steps()[: -self.limit]:
                shutil.rmtree(self.folder(old), ignore_errors=True)

    def load(self, folder: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
        """Weights, optimisers and progress of a checkpoint, of this run or of another."""
        try:
            state, optimisers = read_tensors(folder / STATE), read_objects(folder / OPTIMISERS)
            return state, optimisers, read_json(folder / PROGRESS, dict[str, Any])
        except Exception as error:
            if folder.parent != self.run:
                remedy = "choose another checkpoint"
            elif earlier := [s for s in self.steps() if s < step_of(folder)]:
                remedy = (
                    f"delete it and repeat the command, the run then goes on from checkpoint-{earlier[-1]}"
                )
            else:
                remedy = "delete it and repeat the command, the run then starts anew"
            raise UserError(
                f"resume_from_checkpoint: {folder} is cut short or unreadable; {remedy}"
            ) from error

    def choose(self, wanted: str | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means, or None for a new start.

        "latest"; "checkpoint-<step>" of this run; a path: of another run, for a start whose own checkpoints then go
        first; None: only a new start will do.
        """
        steps = self.steps()
        newest = self.folder(steps[-1]) if steps else None
        if wanted is None:
            if newest:
                raise UserError(
                    f"resume_from_checkpoint: null, but {self.run} holds {newest.name}; "
                    "choose another --output_dir or remove it"
                )
            return None
        if wanted == "latest":
            return newest
        chosen = Path(wanted) if os.sep in wanted else self.run / wanted
        if not CHECKPOINT.fullmatch(chosen.name) or not chosen.is_dir():
            run = chosen if chosen.is_dir() else chosen.parent  # a run folder needs its checkpoint named
            name = "checkpoint-<step> named" if chosen.is_dir() else chosen.name
            there = ", ".join(f"checkpoint-{s}" for s in Checkpoints(run, None).steps()) or "none"
            raise UserError(f"resume_from_checkpoint: no {name} in {run}; there are: {there}")
        elsewhere = chosen.parent.resolve() != self.run.resolve()
        return newest if elsewhere and newest else chosen


class RawWeights:
    """A ring of the newest `keep` sets of trained weights, raw_weights/step-<step>.safetensors."""

    def __init__(self, run: Path, keep: int):
        self.folder, self.keep = run / "raw_weights", keep

    def save(self, step: int, weights: dict[str, Tensor]) -> None:
        path = self.folder / f"step-{step:08d}.safetensors"
        scratch = path.with_suffix(".partial")
        with writing(path):
            try:
                self.folder.mkdir(exist_ok=True)
                save_file({k: v.contiguous() for k, v in weights.items()}, scratch)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
        for old in sorted(self.folder.glob("step-*.safetensors"))[: -self.keep]:
            old.unlink()
