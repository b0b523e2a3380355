"""Which back end computes: "triton" on a CUDA device, "chunked" elsewhere, "naive" only by choice."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from .environment import interpreting, triton_installed, warn_once

NAMES = ("triton", "chunked", "naive")
MAX_TRITON_HEAD_SIZE = 256
MAX_TRITON_FLOAT32_HEAD_SIZE = 64

_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute attention by the back end `name` ("triton", "chunked" or "naive"), or raise: nothing falls back.

    Holds for the whole process, like torch's `sdpa_kernel`, and for the backward of what ran inside. ValueError is
    raised for an unknown name here, and inside by a call that the back end cannot compute.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; pass one of {', '.join(NAMES)}.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def requested() -> str:
    """The back end named by `use_backend`, or "auto"."""
    return _forced or "auto"


def select(name: str, q: Tensor, v: Tensor) -> ModuleType:
    """The module that computes a call made under `requested()` = `name`; one warning per reason to fall back."""
    if name == "naive":
        if q.device.type == "mps":
            raise ValueError("backend 'naive' needs float64, which MPS lacks; use_backend('chunked').")
        from . import naive

        return naive
    if name == "triton" or (name == "auto" and q.device.type == "cuda"):
        reason = triton_obstacle(q.device.type, q.dtype, max(q.shape[-1], v.shape[-1]))
        if reason is None:
            from . import attention_triton

            return attention_triton
        if name == "triton":
            raise ValueError(f"backend 'triton' cannot run: {reason}; use_backend('chunked').")
        warn_once(f"attention runs chunked, without the Triton kernel: {reason}.")
    from . import chunked

    return chunked


def triton_obstacle(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the Triton kernel cannot run, or None if it can."""
    if not triton_installed():
        return "triton is not installed"
    if device_type != "cuda" and not interpreting():
        return f"the tensors are on {device_type}, not on a CUDA device"
    if torch.version.hip is not None and not interpreting():
        return "this torch is built for ROCm, where the kernel was never tried"
    if dtype == torch.float64:
        return "it has no float64"
    if head_size > MAX_TRITON_HEAD_SIZE:
        return f"the head size is {head_size}, above {MAX_TRITON_HEAD_SIZE}"
    if dtype == torch.float32 and head_size > MAX_TRITON_FLOAT32_HEAD_SIZE:
        return (
            f"of float32 no tile is known for head sizes above {MAX_TRITON_FLOAT32_HEAD_SIZE}, here {head_size}, that "
            "keeps its numbers in registers"
        )
    return None
