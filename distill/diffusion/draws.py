"""Random numbers that belong to a sample, not to a process or a batch."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Draws:
    """One CPU generator per row, seeded by (seed, iteration, global row index).

    A row sees the same numbers whatever the batch split, number of processes, device or restart:
    that makes resume exact without stored generator states, and two processes equal one.
    Every method returns float32 on `device`, first dimension len(rows).
    """

    def __init__(self, seed: int, iteration: int, rows: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(mix(seed, iteration, row)) for row in rows]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Unit Gaussian, (B, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators]).to(self.device)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform on [low, high), (B,)."""
        u = torch.cat([torch.rand(1, generator=g) for g in self.generators])
        return (low + (high - low) * u).to(self.device)

    def integers(self, low: int, high: int) -> Tensor:
        """Uniform integers low..high-1 as int64, (B,)."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self.generators]).to(
            self.device
        )


def mix(*numbers: int) -> int:
    """A 63-bit hash of integers, so that neighbouring seeds give unrelated generators."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def same_random(state: Tensor, device: torch.device) -> Iterator[None]:
    """Within it dropout draws the masks that it drew after `state`; afterwards it goes on from where it was."""
    after = random_state(device)
    _set_random(state, device)
    try:
        yield
    finally:
        _set_random(after, device)


def _set_random(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type != "meta":
        torch.set_rng_state(state)
