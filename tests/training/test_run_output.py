"""What a run says, in which order, and what its log and its tracker hold."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fewstep.distill.cli import main
from fewstep.distill.training.runner import Runner
from PIL import Image

OURS = re.compile(
    r"(method|teacher|data|steps|device|time|finished|pipeline|log|samples|load|score|LoRA|)\s|"
    r"(encoding (prompts|images)|\s*\d+%\|).*|$"
)
COUNTERS = "images_per_second", "seconds", "peak_memory_gib", "grad_norm"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def command(teacher: Path, folder: Path, **changes: Any) -> list[str]:
    tree = {
        "output_dir": str(folder / "run"),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 4,
        "max_train_steps": 5,
        "logging_steps": 1,
        "report_to": "tensorboard",
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return ["distill", str(folder / "run.yaml")]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_from_its_first_line_to_its_last(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five lines, the time after three steps, the block; the printed Python loads what lies there."""
    assert main(command(tiny_pipeline, tmp_path)) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    lines = [line for line in out.splitlines() if line]
    assert lines[0] == "method    lcd (LCM), all weights"
    assert lines[1] == f"teacher   {tiny_pipeline}"
    assert lines[2] == "data      emoji-noto, split score: 162 pictures, 162 captions"
    assert lines[3] == "steps     5, batch 4"
    assert lines[4].startswith("device    1 x ") and f"results in {run}; the expected time" in lines[4]
    assert re.fullmatch(r"time      about \d+ s for the other 2 steps \(\S+ s a step\)", lines[5])
    assert re.fullmatch(r"finished  5 steps in \d+ s", lines[6])
    block = dict(line.split(maxsplit=1) for line in lines[6:] if line[0] != " ")
    for key, place in (
        ("pipeline", run / "pipeline"),
        ("log", run / "log.jsonl"),
        ("samples", run / "samples"),
    ):
        assert block[key] == str(place) and place.exists()
    assert block["score"] == f"fewstep evaluate {run / 'pipeline'} --steps 1 2 4"
    at = next(i for i, line in enumerate(lines) if line.startswith("load"))
    names: dict[str, Any] = {}
    exec(lines[at].removeprefix("load").strip() + "\n" + lines[at + 1].strip(), names)
    assert type(names["pipe"]).__name__ == "LatentConsistencyModelPipeline"


def test_the_log_and_the_tracker(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Time rises over two calls, whose first rows lack the keys that logs of before them lack."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = command(tiny_pipeline, tmp_path, checkpointing_steps=3, validation_steps=2, max_train_steps=4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        plain = Runner._pictures

        def stopped(self: Runner) -> None:
            plain(self)
            if self.step == 4:
                raise ZeroDivisionError

        patch.setattr(Runner, "_pictures", stopped)
        main([*flags, "--traceback"])
    run = tmp_path / "run"
    first = rows(run)
    assert [row["step"] for row in first] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 and row["peak_memory_gib"] > 0.1 for row in first)
    assert [row["seconds"] for row in first] == sorted(row["seconds"] for row in first)
    old = [{k: v for k, v in row.items() if k not in COUNTERS} for row in first]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    progress = run / "checkpoint-3" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "seconds": 1000.0}))
    assert main(flags) == 0
    last = rows(run)
    assert last[:3] == old[:3] and last[3]["seconds"] >= 1000
    assert last[3]["loss"] == first[3]["loss"] and last[3]["grad_norm"] == first[3]["grad_norm"]
    events = EventAccumulator(str(run / "fewstep"), size_guidance={"images": 0}).Reload()
    images = events.Images("validation")
    assert {2, 4} <= {image.step for image in images}
    sent = next(image for image in images if image.step == 2)
    shown = np.asarray(Image.open(run / "samples" / "step-000002.png"))
    assert (sent.height, sent.width) == shown.shape[:2]
    assert {e.step for e in events.Scalars("grad_norm")} == {1, 2, 3, 4}


def test_a_norm_for_each_player(tiny_pipeline: Path, tmp_path: Path) -> None:
    method = {"name": "dmd2", "guidance_scale": 2.0, "student_update_freq": 2}
    assert main(command(tiny_pipeline, tmp_path, method=method, max_train_steps=2, report_to="none")) == 0
    found = [
        (key.partition("/")[0], row) for row in rows(tmp_path / "run") for key in row if key.endswith("/loss")
    ]
    assert {"student", "fake_score"} <= {player for player, _ in found}
    assert all(row[f"{player}/grad_norm"] > 0 for player, row in found)


def test_exported_is_said_when_it_is_true(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the second step: the line comes after the record of the export."""
    said: list[tuple[str, bool]] = []
    exported = tmp_path / "run" / "exported.json"
    logged, say = Runner._log, Runner._say

    def interrupt(self: Runner, *arguments: Any) -> None:
        logged(self, *arguments)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    def heard(self: Runner, line: str) -> None:
        said.append((line, exported.is_file()))
        say(self, line)

    monkeypatch.setattr(Runner, "_log", interrupt)
    monkeypatch.setattr(Runner, "_say", heard)
    assert main(command(tiny_pipeline, tmp_path)) == 130
    line, there = said[-1]
    assert line == "interrupted at step 2: saved and exported; repeat the command to go on" and there


def test_no_other_library_speaks(tiny_pipeline: Path, tmp_path: Path) -> None:
    """On both streams of a process of its own, from a folder of pictures: lines of ours and the bars of the work."""
    data = tmp_path / "faces"
    data.mkdir()
    for i in range(4):
        Image.fromarray(torch.full((16, 16, 3), 60 * i, dtype=torch.uint8).numpy()).save(data / f"{i}.png")
    (data / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.png", "text": f"cat {i}"}) + "\n" for i in range(4))
    )
    arguments = command(
        tiny_pipeline,
        tmp_path,
        data={"name": str(data)},
        max_train_steps=2,
        validation_steps=1,
        train_batch_size=2,
    )
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.distill.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    lines = re.split(r"[\r\n]+", done.stdout)
    assert [line for line in lines if not OURS.match(line)] == []
    assert any(line.startswith("finished  2 steps") for line in lines)
