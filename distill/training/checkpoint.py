"""Atomic checkpoints: a folder appears whole or not at all."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..readers import read_json, read_objects, read_tensors
from ..writers import write_folder, writing
from .processes import rank
from .saved import CHECKPOINT, PROGRESS, ProgressFile, checkpoint_folder, saved_steps, step_of

STATE, OPTIMISERS = "state.safetensors", "optimizers.pt"


def save_objects(value: Any, path: Path) -> None:
    """torch.save, which reports a full disk as "unexpected pos": here it is the OSError of the write."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else error from None


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


class Checkpoints:
    """checkpoint-<step> folders of one run, at most `limit` of them; those that cannot be read do not count."""

    def __init__(self, run: Path, limit: int | None):
        self.run, self.limit = run, limit

    def steps(self) -> list[int]:
        return saved_steps(self.run)

    def folder(self, step: int) -> Path:
        return checkpoint_folder(self.run, step)

    def save(self, step: int, state: dict[str, Tensor], optimisers: Any, progress: ProgressFile) -> None:
        def fill(folder: Path) -> None:
            save_file(state, folder / STATE)
            save_objects(optimisers, folder / OPTIMISERS)
            (folder / PROGRESS).write_text(json.dumps(progress))

        write_folder(self.folder(step), fill)
        if self.limit is not None:
            for old in self.steps()[: -self.limit]:
                shutil.rmtree(self.folder(old), ignore_errors=True)

    def damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint's files by their heads and lengths, None for one that can be read."""
        try:
            with safe_open(folder / STATE, framework="pt") as state:
                state.keys()
            torch.load(folder / OPTIMISERS, map_location="cpu", weights_only=True, mmap=True)
            read_json(folder / PROGRESS, ProgressFile)
        except Exception as error:  # torch and safetensors have many of their own
            return " ".join(str(error).split())[:120] or type(error).__name__
        return None

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that can be read, None where there is none at all.

        Those after it are kept aside as checkpoint-<step>.damaged, with a warning. UserError where none can be read.
        """
        steps, damaged = self.steps(), list[tuple[Path, str]]()
        while steps:
            folder = self.folder(steps.pop())
            wrong = self.damage(folder)
            if wrong is None:
                self._set_aside(damaged, folder)
                return folder
            damaged.append((folder, wrong))
        if damaged:
            folder, wrong = damaged[0]
            raise UserError(
                f"resume_from_checkpoint: {folder} is cut short or unreadable ({wrong}), and there is no other that is "
                "whole; delete it and repeat the command, the run then starts anew"
            )
        return None

    def _set_aside(self, damaged: list[tuple[Path, str]], whole: Path) -> None:
        for folder, wrong in damaged if rank() == 0 else []:
            kept = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            print(
                f"fewstep: warning: {folder} is cut short or unreadable ({wrong}); it is kept as {kept.name}, the run "
                f"goes on from {whole.name}",
                file=sys.stderr,
            )

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
        if wanted is None:
            if steps:
                raise UserError(
                    f"resume_from_checkpoint: null, but {self.run} holds checkpoint-{steps[-1]}; "
                    "choose another --output_dir or remove it"
                )
            return None
        if wanted == "latest":
            return self.newest_whole()
        chosen = Path(wanted) if os.sep in wanted else self.run / wanted
        if not CHECKPOINT.fullmatch(chosen.name) or not chosen.is_dir():
            run = chosen if chosen.is_dir() else chosen.parent  # a run folder needs its checkpoint named
            name = "checkpoint-<step> named" if chosen.is_dir() else chosen.name
            there = ", ".join(f"checkpoint-{s}" for s in saved_steps(run)) or "none"
            raise UserError(f"resume_from_checkpoint: no {name} in {run}; there are: {there}")
        elsewhere = chosen.parent.resolve() != self.run.resolve()
        return (self.newest_whole() if elsewhere else None) or chosen


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
