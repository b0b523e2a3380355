"""SIGKILL at random moments of training, search, evaluate and compare; repeated, each must end as if undisturbed.

    python scripts/kill_runs.py --kills 50 --output configs/emoji/results/kills.json

Each command works on the embedded teacher and a few of its pictures, and has phases. A trial starts one in a new
folder, kills it in each phase in turn (seeded: which entry into the phase, how long after it) with all processes that
it has started, repeats it to the end, and compares weights, optimiser states, logs, scores and pictures bit for bit
with an undisturbed run. Seconds, memory and machine may differ. Nothing unfinished may be left: no .partial, .old,
.part, .tmp.

A killed process is a fork of this one, which has imported everything and computed nothing; so is the process in which
`compare` scores a model. Exit code 1 where anything differs.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import yaml
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline  # noqa: F401  (imported before forks)
from fewstep.distill.cli import main as fewstep
from fewstep.distill.data import cache
from fewstep.distill.data.sources import load_data
from fewstep.distill.readers import read_json, read_json_lines, read_objects
from fewstep.distill.reports import compare, evaluate, generation
from fewstep.distill.search import runner as search
from fewstep.distill.training import checkpoint, runner
from fewstep.distill.training.measure import environment
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = re.compile(r"\.(partial|old|part|tmp|given)$")
SPLITS = {"train": 24, "reward": 8, "holdout": 8}
# Of each command: where its phases begin and end, beside "start", which is all before the first.
PHASES: dict[str, dict[str, tuple[Any, str]]] = {
    "train": {
        "encoding": (cache.Records, "build"),
        "training": (runner.Runner, "_iteration"),
        "checkpoint": (checkpoint.Checkpoints, "save"),
        "export": (runner.Runner, "_export"),
    },
    "search": {
        "candidates": (search.SearchRunner, "_score"),
        "export": (search.SearchRunner, "_export"),
        "report": (search, "report"),
    },
    "evaluate": {
        "pictures": (generation.Generation, "make"),
        "reference": (evaluate.DataJudge, "scores"),
        "report": (evaluate, "write_report"),
    },
    "compare": {
        "scoring": (compare, "_score"),
        "strips": (compare, "_strips"),
        "page": (compare, "write_file"),
    },
}


@dataclass(frozen=True)
class Target:
    """Kill `delay` seconds after the `entry`-th time that the process comes to `phase`."""

    phase: str
    entry: int
    delay: float


@dataclass
class Watched:
    """How a child ended: its exit code, None if it was killed; how long it was in each phase, each time."""

    code: int | None
    seconds: dict[str, list[float]]


class Work:
    """One folder of commands; `reference` is a finished, undisturbed one that a search starts from."""

    def __init__(self, folder: Path, data: Path, student: Path):
        self.folder, self.data, self.student = folder, data, student
        folder.mkdir(parents=True)
        for name, tree in (("train", self._training()), ("search", self._search())):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def _training(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "run"),
            "teacher": {"path": "emoji-sd"},
            "data": {"name": str(self.data)},
            "method": {"name": "lcd", "guidance_dim": 256, "w_min": 1, "w_max": 3, "w_export": 2},
            "student": {"kind": "lora", "rank": 8, "target_modules": ["to_q", "to_v"], "export_fused": True},
            "train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 1,
            "validation_steps": 3, "validation_prompts": ["red apple"], "use_ema": True,
            "raw_weights": {"every": 3},
        }  # fmt: skip

    def _search(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "found"),
            "student": {"path": str(self.student)},
            "data": {"name": str(self.data), "split": "reward"},
            "method": {"name": "q_sched", "quantisation": None, "family": "constant", "points": 2},
            "fitness": {"kind": "kid"},
            "steps": 1, "max_candidates": 5, "num_images": 4, "finalists": 1, "final_images": 4,
            "report": {"split": "train", "num_images": 4, "seeds": 2},
        }  # fmt: skip

    def command(self, verb: str) -> list[str]:
        scored = ["--data", str(self.data), "--num_images", "4", "--seeds", "2", "--batch_size", "2"]
        scored += ["--device", "cpu"]
        return {
            "train": ["distill", str(self.folder / "train.yaml")],
            "search": ["distill", str(self.folder / "search.yaml")],
            "evaluate": [
                "evaluate", str(self.student / "pipeline"), "--steps", "1", "2", *scored,
                "--output", str(self.folder / "report.json"),
            ],
            "compare": [
                "compare", str(self.student), f"same={self.student / 'pipeline'}", "--steps", "1", "--teacher",
                "none", *scored, "--output", str(self.folder / "page"),
            ],
        }[verb]  # fmt: skip

    def run(self, verb: str, target: Target | None = None) -> Watched:
        """The command in a fork; killed at `target` if it comes there."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._inside(verb, writing)
        os.close(writing)
        seconds: dict[str, list[float]] = {}
        count, rest, killed = Counter[str](), b"", False
        with contextlib.closing(open(reading, "rb", buffering=0)) as pipe:
            while chunk := pipe.read(4096):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    what, phase, value = line.decode().split()
                    if what == "leave":
                        seconds.setdefault(phase, []).append(float(value))
                    count[phase] += what == "enter"
                    if target and (what, phase, count[phase]) == ("enter", target.phase, target.entry):
                        select.select([], [], [], target.delay)
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        return Watched(None if killed else os.waitstatus_to_exitcode(status), seconds)

    def _inside(self, verb: str, tell: int) -> None:
        """The child's whole life."""
        os.setsid()
        code = 1
        with (self.folder / f"{verb}.txt").open("a") as said:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            os.environ |= {"FEWSTEP_CACHE": str(self.folder / "cache" / verb), "ACCELERATE_USE_CPU": "true"}
            torch.set_num_threads(1)
            compare.subprocess = SimpleNamespace(run=forked, DEVNULL=None)  # type: ignore[attr-defined]
            for phase, (owner, name) in PHASES[verb].items():
                setattr(owner, name, told(getattr(owner, name), phase, tell))
            try:
                begun = time.perf_counter()
                os.write(tell, b"enter start 0\n")
                code = fewstep(self.command(verb))
                os.write(tell, f"leave start {time.perf_counter() - begun:.4f}\n".encode())
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def result(self, verb: str) -> dict[str, Any]:
        """What the end of a command must have in common with that of another."""
        if verb == "evaluate":
            return {"report": lasting(read_json(self.folder / "report.json"))}
        folder = self.folder / {"train": "run", "search": "found", "compare": "page"}[verb]
        found: dict[str, Any] = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if path.suffix in (".safetensors", ".png"):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif path.suffix == ".pt":
                found[name] = repr(plain(read_objects(path)))
            elif path.suffix == ".json":
                found[name] = lasting(read_json(path))
            elif path.suffix == ".jsonl":
                found[name] = [lasting(row) for row in read_json_lines(path)]
            else:
                found[name] = None  # cards and pages hold seconds: that they are there
        return json.loads(json.dumps(found).replace(str(self.folder), "FOLDER"))

    def unfinished(self) -> list[str]:
        return sorted(str(p) for p in self.folder.rglob("*") if UNFINISHED.search(p.name))


def told(function: Callable[..., Any], phase: str, tell: int) -> Callable[..., Any]:
    """The function, which says when it begins and ends."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        os.write(tell, f"enter {phase} 0\n".encode())
        try:
            return function(*args, **kwargs)
        finally:
            os.write(tell, f"leave {phase} {time.perf_counter() - begun:.4f}\n".encode())

    return wrapped


def forked(command: list[str], **_: Any) -> Any:
    """`subprocess.run` of [python, -m, fewstep.distill.cli, *arguments]."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = fewstep(command[3:])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


PASSING = {
    "seconds", "seconds_per_image", "images_per_second", "peak_memory", "peak_memory_gib", "device", "commit",
}  # fmt: skip


def lasting(value: Any) -> Any:
    """JSON without what time and memory were taken."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in PASSING}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Nested objects with the hash of each tensor's bytes in its place."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def write_data(folder: Path) -> None:
    """The first captioned emoji of each split, as a folder of pictures."""
    for split, count in SPLITS.items():
        rows = load_data("emoji", split=split, resolution=32)
        (folder / split).mkdir(parents=True)
        with (folder / split / "metadata.jsonl").open("w") as lines:
            for i, image in enumerate(rows.images(range(count))):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / split / f"{i}.png")
                lines.write(json.dumps({"file_name": f"{i}.png", "text": rows.captions[i]}) + "\n")


def in_a_fork(function: Callable[[], None]) -> None:
    """No tensor is computed in this process: forks of one that has done so may wait for threads that they lack."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, function


def finish(work: Work, verb: str) -> Watched:
    watched = work.run(verb)
    if watched.code != 0:
        said = (work.folder / f"{verb}.txt").read_text(errors="replace")[-3000:]
        raise SystemExit(f"{verb}: ended with {watched.code} in {work.folder}\n{said}")
    return watched


def moment(undisturbed: Watched, phase: str, draw: random.Random) -> Target:
    """In one of the first two entries into a phase, rather early in it: what was done before a kill is quick then.

    "start" is the first quarter of the whole, if it is no longer than a phase.
    """
    lasts = dict(undisturbed.seconds)
    (whole,) = lasts.pop("start")
    if phase == "start":
        return Target(phase, 1, draw.random() * min(whole / 4, *map(max, lasts.values())))
    entry = draw.randint(1, min(2, len(lasts[phase])))
    return Target(phase, entry, draw.random() ** 2 * lasts[phase][entry - 1])


def trials(root: Path, wanted: int, seed: int) -> dict[str, Any]:
    """Counts of kills by command and phase, and of trials that did not end like the undisturbed run."""
    draw = random.Random(seed)
    in_a_fork(lambda: write_data(root / "data"))
    reference = Work(root / "reference", root / "data", root / "reference" / "run")
    undisturbed = {verb: finish(reference, verb) for verb in PHASES}
    expected = {verb: reference.result(verb) for verb in PHASES}
    kills = {verb: Counter[str]() for verb in PHASES}
    count, differing, left = 0, [], list[str]()
    while sum(c.total() for c in kills.values()) < wanted:
        for verb in PHASES:
            work = Work(root / f"trial-{count}", root / "data", reference.folder / "run")
            for phase in ("start", *PHASES[verb]):
                if sum(c.total() for c in kills.values()) >= wanted:
                    break
                watched = work.run(verb, moment(undisturbed[verb], phase, draw))
                if watched.code is not None:
                    break
                kills[verb][phase] += 1
            finish(work, verb)
            found = work.result(verb)
            if found != expected[verb]:
                names = [k for k in {**found, **expected[verb]} if found.get(k) != expected[verb].get(k)]
                differing.append(f"{verb}, trial {count}: {', '.join(names)}")
            left += work.unfinished()
            print(f"trial {count}: {verb}, killed {dict(kills[verb])}", flush=True)
            count += 1
            if found == expected[verb] and not work.unfinished():
                shutil.rmtree(work.folder)
    left += reference.unfinished()
    return {
        "kills": {verb: dict(c) for verb, c in kills.items()},
        "total": sum(c.total() for c in kills.values()),
        "trials": count,
        "differing": differing,
        "left_behind": [Path(p).relative_to(root).as_posix() for p in left],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a new folder, kept; default: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON of what was counted")
    args = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.work or Path(temporary) / "work"
        root.mkdir(parents=True)
        found = trials(root, args.kills, args.seed)
        record = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": f"python scripts/kill_runs.py --kills {args.kills} --seed {args.seed}",
            **found,
            "seconds": round(time.perf_counter() - begun),
            **environment(ROOT),
        }
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    return 1 if found["differing"] or found["left_behind"] else 0


if __name__ == "__main__":
    sys.exit(main())
