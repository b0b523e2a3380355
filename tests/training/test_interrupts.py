"""Signals: which exit code, which goes first, what stays ignored, and a command of ours below another."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from fewstep.distill import cli
from fewstep.distill.errors import UserError
from fewstep.distill.training.interrupts import Ended, held_back, run_child, terminations_raised


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Python's own handlers, whatever the shell that started the tests ignores."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_command_ends_with_the_signals_code(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setitem(cli.VERBS, "demo", lambda arguments: signal.raise_signal(number) or 0)
    assert cli.main(["demo"]) == code
    assert {n: signal.getsignal(n) for n in before} == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminations_raised(), held_back() as pending:
            signal.raise_signal(signal.SIGHUP)
        assert pending.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ((), None),
        ((signal.SIGINT,), signal.SIGINT),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGTERM, signal.SIGINT), signal.SIGTERM),
        ((signal.SIGHUP, signal.SIGTERM), signal.SIGHUP),
    ],
)
def test_signals_that_are_held_back_end_nothing_and_the_graver_counts(
    sent: tuple[int, ...], kept: int | None
) -> None:
    with held_back() as pending:
        for number in sent:
            signal.raise_signal(number)
    assert pending.number == kept


def test_one_signal_alone_can_be_held_back() -> None:
    with terminations_raised(), pytest.raises(Ended, match="SIGTERM"), held_back(signal.SIGINT) as pending:
        signal.raise_signal(signal.SIGINT)
        assert pending.number == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_on_to_the_child(number: int, tmp_path) -> None:
    """The child writes its name down and waits; the parent is told to stop, and the child is gone."""
    name = tmp_path / "child"
    code = (
        f"import os, pathlib, signal, time; pathlib.Path({str(name)!r}).write_text(str(os.getpid()));"
        f"os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    )
    with terminations_raised(), pytest.raises(KeyboardInterrupt) as ended:
        run_child([sys.executable, "-c", code])
    assert isinstance(ended.value, Ended) == (number == signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(int(name.read_text()), 0)


def test_a_childs_code_and_its_signal() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(2)"]) == 2
    with pytest.raises(Ended, match="SIGTERM"):
        run_child([sys.executable, "-c", "raise SystemExit(143)"])
    with pytest.raises(Ended, match="SIGHUP"):
        run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 1)"])
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", "raise SystemExit(130)"])
    assert not issubclass(Ended, UserError)
