"""Any model under torch.func.jvp, unchanged: its attention calls become ours while the mode is on."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .interface import attention


class ContiguousGroupNorm(TorchFunctionMode):
    """Context in which inputs of `F.group_norm` are made contiguous: torch's forward-mode formula for it fails on
    channels-last ones, which UNet2DModel's attention produces."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.group_norm:
            return contiguous_group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class ForwardModeAttention(ContiguousGroupNorm):
    """Context in which `F.scaled_dot_product_attention` is `fewstep.kernels.attention`.

        with ForwardModeAttention():
            out, tangent = torch.func.jvp(model, (x, t), (tx, tt))

    Inputs of `F.group_norm` are made contiguous too. Raises ValueError as `attention` does, dropout included.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention` under the argument names of torch's operator."""
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def contiguous_group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.group_norm(input.contiguous(), *args, **kwargs)
