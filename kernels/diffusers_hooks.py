"""Our attention inside diffusers: a backend of its dispatcher, and a processor for the classes that ignore it.

`ForwardModeAttention` needs neither and serves every model; these two are for one model, or one part of it.
"""

import functools
import inspect
import warnings
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from .function_mode import ForwardModeAttention
from .interface import attention

BACKEND_NAME = "fewstep"


def register_attention_backend() -> bool:
    """Make `model.set_attention_backend("fewstep")` and `with attention_backend("fewstep")` choose `attention`.

    Serves models that call diffusers' dispatcher (Flux, Wan, ...); UNet2D*, DiT, PixArt, SD3 and Sana call torch
    directly and ignore it. diffusers has no public way in: where its private tables have changed, a RuntimeWarning
    says so and False is returned. Repeating the call changes nothing.
    """
    try:
        names, registry = (
            attention_dispatch.AttentionBackendName,
            attention_dispatch._AttentionBackendRegistry,
        )
        if BACKEND_NAME in names._value2member_map_:
            return True
        member = str.__new__(names, BACKEND_NAME)
        member._name_, member._value_ = BACKEND_NAME.upper(), BACKEND_NAME
        member.__objclass__, member._sort_order_ = names, len(names._member_names_)
        registry.register(member)(dispatched)
        names._member_map_[member._name_] = member
        names._value2member_map_[member._value_] = member
        names._member_names_.append(member._name_)
        type.__setattr__(names, member._name_, member)
    except (AttributeError, TypeError) as error:
        warnings.warn(
            f"diffusers' attention backends have changed ({error}); use ForwardModeAttention.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: object | None = None,
) -> Tensor:
    """`attention` in the dispatcher's layout (B, L, H, D)."""
    if _parallel_config is not None:
        raise ValueError("the fewstep backend has no context parallelism; unset the model's parallel config.")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)


class ForwardModeProcessor:
    """An attention processor that runs another one with our attention; its output is contiguous."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ForwardModeAttention():
            result = self.processor(attn, *args, **kwargs)
        if isinstance(result, tuple):
            return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in result)
        return result.contiguous()


def wrap_processor(processor: Any) -> ForwardModeProcessor:
    """`processor` with our attention, under its own signature: attention modules drop arguments not named in it."""
    signature = inspect.signature(type(processor).__call__)

    @functools.wraps(ForwardModeProcessor.__call__)
    def call(self: ForwardModeProcessor, *args: Any, **kwargs: Any) -> Any:
        return ForwardModeProcessor.__call__(self, *args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    kind = type(f"ForwardMode{type(processor).__name__}", (ForwardModeProcessor,), {"__call__": call})
    return kind(processor)


def wrap_attention_processors(model: nn.Module) -> int:
    """Give every attention module of `model` a wrapped processor; returns how many. UNet2DModel included.

    Raises ValueError if the model has no attention module.
    """
    modules: list[Any] = [m for m in model.modules() if callable(getattr(m, "set_processor", None))]
    if not modules:
        raise ValueError(
            f"model is a {type(model).__name__} without attention processors; use ForwardModeAttention."
        )
    for module in modules:
        if not isinstance(module.processor, ForwardModeProcessor):
            module.set_processor(wrap_processor(module.processor))
    return len(modules)
