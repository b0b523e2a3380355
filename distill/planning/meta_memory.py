"""How many bytes a step would hold, counted on the meta device: nothing is computed or allocated."""

import weakref
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..models.quantise import plain_parts


def nbytes(tensors: Any) -> int:
    """Of plain tensors and of those inside of quantised ones."""
    return sum(t.nbytes for tensor in tensors for t in plain_parts(tensor))


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the largest sum of meta tensors alive at once that are not among `known`."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen = WeakIdKeyDictionary()
        for t in (part for tensor in known for part in plain_parts(tensor)):
            self.seen[t.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            for part in plain_parts(leaf) if isinstance(leaf, Tensor) else ():
                if part.device.type == "meta":
                    self._add(part.untyped_storage())
        return out

    def _add(self, storage: UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.live -= size


def fused_attention() -> Any:
    """Within it attention keeps queries, keys, values and output, as fused kernels do, and no score matrix."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Kept.apply(query, key, value)

    return mock.patch.object(F, "scaled_dot_product_attention", attend)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[3])
