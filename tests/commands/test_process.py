"""How a process of ours waits and keeps memory, as GNU OpenMP and the kernel see it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fewstep.distill.commands.process import settle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux")

FAULTS = """
import ctypes, resource, sys
from fewstep.distill.cli import main
code = main(["--help"])
assert "torch" not in sys.modules
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(40 * 2**20)
    ctypes.memset(block, 1, 40 * 2**20)
    libc.free(block)
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

THREADS = """
import ctypes, sys
from fewstep.distill.cli import main
main(["--help"])
ctypes.CDLL(sys.argv[1])
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "LD_PRELOAD")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)


def page_faults(**environment: str) -> int:
    return int(run(FAULTS, **environment).stdout.split("faults ")[1])


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    """Ten thousand pages are written for the second time."""
    assert page_faults() < 100
    assert page_faults(MALLOC_MMAP_THRESHOLD_="1000000") > 5000  # the user's


def test_the_threads_of_torchs_openmp_wait_passively() -> None:
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    found = sorted((Path(torch.origin).parent / "lib").glob("libgomp*"))
    if not found:
        pytest.skip("this torch brings another OpenMP")
    waits = run(THREADS, str(found[0]), OMP_DISPLAY_ENV="verbose").stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in waits and "GOMP_SPINCOUNT = '0'" in waits
    own = run(THREADS, str(found[0]), OMP_DISPLAY_ENV="verbose", OMP_WAIT_POLICY="active").stderr
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in own


def test_a_process_that_has_torch_is_left_alone() -> None:
    import torch  # noqa: F401

    environment: dict[str, str] = {}
    settle(environment)
    assert environment == {}
