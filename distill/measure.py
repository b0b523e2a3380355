"""What the benchmarks share: seconds, peak memory, quantiles, and what they ran on."""

import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
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
            self.known = _forget_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.known:
            self.bytes = _resident_peak()


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile of two or more values."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": cuts[0], "q80": cuts[-1]}


def environment(repository: Path) -> dict[str, str]:
    """Device, versions and the repository's commit ("unknown" outside git; "+" marks uncommitted changes)."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "commit": commit(repository),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


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
