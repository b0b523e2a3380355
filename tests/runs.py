"""Runs of a configuration, in this process or in two."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.training.runner import Runner

PASSING = ("images_per_second", "seconds", "peak_memory_gib")  # of a row of a run's log


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """A row of log.jsonl without what time and memory were taken."""
    return {k: v for k, v in row.items() if k not in PASSING}


def train(tree: dict[str, Any]) -> Runner:
    runner = Runner(load_config(tree))
    runner.train()
    return runner


def train_in_two_processes(tree: dict[str, Any], folder: Path) -> None:
    """`fewstep distill` under torch's launcher, on a file in `folder`; each process takes a batch of its own."""
    path = folder / "two_processes.yaml"
    path.write_text(yaml.safe_dump(tree))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    child = subprocess.run(
        [sys.executable, *launch, "-m", "fewstep.distill.cli", "distill", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr[-3000:]
