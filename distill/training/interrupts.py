"""Signals that end a command: Ctrl-C, SIGTERM (schedulers, `docker stop`, spot machines), SIGHUP (a closed terminal).

Every command ends with 128 + the signal's number: 130, 143, 129. Where stopping at once would lose work, the signals
are held back to the next whole step.
"""

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

TERMINATIONS = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP came, as KeyboardInterrupt is for Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Pending:
    """number: of the signal that came and waits, None for none; one that leaves little time goes before Ctrl-C."""

    def __init__(self) -> None:
        self.number: int | None = None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        if self.number in (None, signal.SIGINT):
            self.number = number


def raise_for(number: int, frame: FrameType | None = None) -> None:
    """The exception of a signal."""
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)


@contextmanager
def terminations_raised() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Ended`; one that is ignored from outside, as under nohup, stays so."""
    with _handled(TERMINATIONS, raise_for):
        yield


@contextmanager
def held_back(*numbers: int) -> Iterator[Pending]:
    """Within it the signals (by default all three) end nothing and are noted."""
    pending = Pending()
    with _handled(numbers or (signal.SIGINT, *TERMINATIONS), pending.note):
        yield pending


@contextmanager
def _handled(numbers: tuple[int, ...], handler: object) -> Iterator[None]:
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals to the main one alone
        yield
        return
    before = {n: signal.getsignal(n) for n in numbers}
    taken = [n for n, was in before.items() if n == signal.SIGINT or was is not signal.SIG_IGN]
    for n in taken:
        signal.signal(n, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for n in taken:
            signal.signal(n, before[n])


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 + the signal's number."""
    return 128 + (interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT)


def run_child(command: Sequence[str]) -> int:
    """The exit code of a command of ours, its output dropped. A signal that ends either ends the other too."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = child.wait()
    except KeyboardInterrupt as interrupt:
        child.send_signal(exit_code(interrupt) - 128)
        child.wait()
        raise
    for number in (signal.SIGINT, *TERMINATIONS):
        if code in (128 + number, -number):
            raise_for(number)
    return code
