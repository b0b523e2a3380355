"""Which rows an iteration trains on."""

from functools import lru_cache

import torch
from torch import Tensor

from ..diffusion.draws import mix


def rows_of(seed: int, iteration: int, batch_size: int, num_rows: int) -> list[int]:
    """Rows of batch `iteration` (0-based): positions [i B, (i + 1) B) in the endless row of shuffled epochs.

    A function of its arguments alone: every process gets the same rows, and a restart goes on where it stood.
    Each epoch holds each of the `num_rows` rows once; a batch may reach over several epochs.
    """
    assert num_rows > 0 and batch_size > 0
    rows: list[int] = []
    position, end = iteration * batch_size, (iteration + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, num_rows)
        taken = _permutation(seed, epoch, num_rows)[offset : offset + end - position].tolist()
        rows += taken
        position += len(taken)
    return rows


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(mix(seed, epoch)))
