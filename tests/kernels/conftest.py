"""The tests of this folder, and the processes that they start, share attention_reference.py."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["naive", "chunked", "chunked in small pieces"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Iterator[str]:
    """All back ends that run here, the last with chunks that end inside the tests' sizes."""
    from fewstep.kernels import chunked, use_backend

    name = request.param.split()[0]
    if request.param != name:
        monkeypatch.setitem(chunked.ELEMENTS, "cpu", 24)
        monkeypatch.setattr(chunked, "MIN_ROWS", 3)
    with use_backend(name):
        yield name
