"""What the benchmarks share: seconds, peak memory, quantiles, and what they ran on."""

import ctypes
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call, work on a CUDA device included."""
    synchronise()
    begin = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - begin


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """Peak memory of this process so far in MiB: allocated on the CUDA device, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident_peak() / 2**20


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would start at the size of the parent process
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if platform.system() == "Darwin" else 2**10)


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: allocated on a CUDA `device`, else resident."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()
    return peak / 2**30


def duration(seconds: float) -> str:
    """ "1 h 05 min", "3 min", "12 s"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


class PeakMemory:
    """Peak bytes within a `with` block: allocated on the CUDA device, else resident in the whole process.

    `bytes` is None where the system cannot forget an earlier peak (not Linux).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        cuda = device.type == "cuda"
        self.measure = "cuda max_memory_allocated" if cuda else "resident memory of the process"

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            give_back()
            self.known = _forget_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.known:
            self.bytes = _resident_peak()


def give_back() -> None:
    """Return memory that was freed, and that the C library keeps for later, to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each, taken in turns after `warm_up` rounds that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm_up + rounds):
        for name, call in calls.items():
            taken = seconds(call)
            if i >= warm_up:
                found[name].append(taken)
    return found


def added_mib(call: Callable[[], object], times: int = 3) -> float:
    """MiB that some calls add to the peak of this process."""
    before = peak_mib()
    for _ in range(times):
        call()
    return peak_mib() - before


def printed_number(script: str, *words: object) -> float:
    """The last line that a process of its own prints: a peak that no earlier work has raised."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def three_quantiles(q: dict[str, float], unit: float = 1) -> str:
    """Median (20 % to 80 %)."""
    return f"{q['median'] * unit:.4g} ({q['q20'] * unit:.4g} to {q['q80'] * unit:.4g})"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile of two or more values."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": cuts[0], "q80": cuts[-1]}


def environment(repository: Path) -> dict[str, str]:
    """Device, versions of what is installed, and the repository's commit ("unknown" outside git; "+" marks uncommitted
    changes)."""
    installed = {name: found for name in ("diffusers", "triton") if (found := installed_version(name))}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "commit": commit(repository),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **installed,
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(repository: Path) -> str:
    try:
        head = _git(repository, "rev-parse", "HEAD").strip()
        return head + ("+" if _git(repository, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
