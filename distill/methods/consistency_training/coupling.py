"""Which noise goes with which sample: minibatch optimal transport (arXiv 2302.00482; in arXiv 2502.01441 exact)."""

from collections.abc import Hashable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def optimal_pairing(x0: Tensor, eps: Tensor, groups: Sequence[Hashable] | None = None) -> Tensor:
    """The permutation pi (B,) with the smallest sum over a of |x0_a - eps_pi(a)|^2, so that eps[pi] belongs to x0.

    x0, eps (B, ...). Rows of equal `groups` exchange noise among themselves alone: coupling across conditions would
    bias p(noise | condition). The linear assignment is exact, O(B^3) on the CPU, with its costs 26 ms for 128 latents
    of 4 x 32 x 32 on a busy core. The plan is of these B rows: with it, a batch split into processes or accumulation
    steps has other pairs than the whole one.
    """
    if x0.is_meta:  # a dry run has no values
        return torch.arange(len(x0), device=x0.device)
    # |x0|^2 and |eps|^2 add the same to every permutation.
    cost = -(x0.double().flatten(1) @ eps.double().flatten(1).T).cpu()
    members: dict[Hashable, list[int]] = {}
    for row in range(len(x0)):
        members.setdefault(None if groups is None else groups[row], []).append(row)
    pairing = torch.arange(len(x0))
    for rows in members.values():
        index = torch.tensor(rows)
        _, columns = linear_sum_assignment(cost[index][:, index].numpy())
        pairing[index] = index[columns]
    return pairing.to(x0.device)
