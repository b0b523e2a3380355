"""Which of a launch's processes this is."""

import os

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def rank() -> int:
    """This process's number among those of its launch."""
    return _number(RANKS, 0)


def num_processes() -> int:
    """As torchrun, accelerate and MPI tell their processes."""
    return _number(SIZES, 1)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)
