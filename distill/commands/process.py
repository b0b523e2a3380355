"""How a process of ours waits for threads and keeps memory, set before torch is loaded; under Linux alone.

Waiting: the threads of GNU OpenMP, which torch's wheels use, spin while they wait for one another. Beside any other
busy process the one that has work then waits for a core on which another of them spins. Passive waiting sleeps.

Memory: glibc gives each large tensor back to the kernel and has its pages zeroed again at the next step. Kept, they cause no
page faults; the peak stays the same, memory that was freed stays with the process.

A step of `lcd` on emoji-sd, batch 48, two threads on two cores of an AMD EPYC; median of 5 steps, and system time
and page faults of one. About four single-threaded processes of low priority ran all along; "busy" is one more of normal
priority.

| setting | s a step | s a step, busy | system s | page faults |
|---|---:|---:|---:|---:|
| none | 13.5 | 45.2 | 0.05 | 24,060 |
| passive | 2.7 | 4.1 | 0.08 | 29,173 |
| passive, memory kept | 2.9 | BUSY_KEPT | 0.04 | 0 |
"""

import ctypes
import os
import sys
from collections.abc import MutableMapping

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # beginnings of names
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Passive waiting and kept memory for this process, and the former for its children; once torch is loaded, nothing.

    What the user set stays: an environment that names one of WAITING, or begins a name with one of ALLOCATOR.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return
    if not any(name in environ for name in WAITING):
        environ["OMP_WAIT_POLICY"] = "passive"
    if not any(name.startswith(ALLOCATOR) for name in environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
