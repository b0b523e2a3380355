"""How far two correct computations in float32 may lie apart."""

import torch
from torch import nn


def rounding(network: nn.Module, num_calls: int) -> float:
    """For values of order one: each layer of each call rounds once on either side, at most eps / 2, all added up."""
    layers = sum(
        1 for module in network.modules() if next(module.parameters(recurse=False), None) is not None
    )
    return 2 * layers * num_calls * torch.finfo(torch.float32).eps / 2
