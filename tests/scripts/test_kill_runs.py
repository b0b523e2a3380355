"""Killed commands end as if undisturbed: `scripts/kill_runs.py` with a few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_runs.py"


@pytest.mark.slow
def test_four_kills(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    command = [sys.executable, SCRIPT, "--kills", "4", "--seed", "3", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads(output.read_text())
    assert found["total"] == 4 == sum(found["kills"]["train"].values())
    assert (found["differing"], found["left_behind"]) == ([], [])
