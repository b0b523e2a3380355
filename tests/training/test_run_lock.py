"""One command at a time in a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fewstep.distill.errors import UserError
from fewstep.distill.training.run_lock import LOCK, locked

HOLDER = """
import fcntl, os, sys, time
d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(d, fcntl.LOCK_EX)
os.write(d, b"process 7 on afar")
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_command_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / LOCK)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                UserError,
                match=r"output_dir: .*/run is in use by process 7 on afar; wait for it, or choose another --output_dir",
            ),
            locked(run),
        ):
            raise AssertionError("two at once")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(run):
        assert (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match=r"output: .* in use"), locked(run, "output"):
            raise AssertionError("two at once")
    with locked(run):
        pass
    assert list(run.iterdir()) == []


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="refused"), locked(tmp_path / "mine" / "a" / "run"):
        raise UserError("refused")
    assert list((tmp_path / "mine").iterdir()) == []
    with locked(tmp_path / "mine" / "a" / "run"):
        (tmp_path / "mine" / "a" / "run" / "kept").write_text("")
    assert [p.name for p in (tmp_path / "mine" / "a" / "run").iterdir()] == ["kept"]


def test_the_first_process_of_a_launch_holds_it_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).is_file()
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="in use"), locked(tmp_path / "run"):
            raise AssertionError("two at once")


def test_the_winner_of_a_lock_that_was_just_removed_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is unlinked between opening and locking: the lock on it would exclude nobody."""
    from fewstep.distill.training import run_lock

    plain, times = run_lock.fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        times.append(descriptor)
        if len(times) == 1:
            (tmp_path / LOCK).unlink()
        plain(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(times) == 2 and (tmp_path / LOCK).is_file()
        with pytest.raises(UserError, match="in use"), locked(tmp_path):
            raise AssertionError("two at once")
