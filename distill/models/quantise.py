"""Integer weights and activations by torchao, as diffusers loads and saves them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UserError

GROUP = 32  # input channels that share a scale below 8 bits, torchao's default
ROWS = "int8_asym_per_token"  # activations: int8 with a scale and a zero point for each row of the last axis


@dataclass(frozen=True)
class Scheme:
    """Bits of the weights, 2 to 8, and whether activations are int8 (dynamic) or stay floating point."""

    weights: int
    activations: bool

    @classmethod
    def of(cls, name: str) -> "Scheme":
        """ "w4a8" -> weights of 4 bits, activations of 8; "w4": weights alone. Raises UserError for another name."""
        match = re.fullmatch(r"w([2-8])(a8)?", name)
        if match is None:
            raise UserError(
                f"method.quantisation: {name!r} is no scheme; write w8a8, w4a8, w8, w4 or the like (w2 to w8), or null"
            )
        return cls(int(match[1]), match[2] is not None)

    def linear(self) -> Any:
        """torchao's configuration of the linear layers.

        8 bits: a symmetric scale for each output row; below: one for each GROUP input channels. Activations: int8 of
        each row of the input, symmetric beside weights of 8 bits (whose product is an integer one), else asymmetric.
        """
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8DynamicActivationIntxWeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
        )
        from torchao.quantization.granularity import PerGroup

        if self.weights == 8:
            return Int8DynamicActivationInt8WeightConfig() if self.activations else Int8WeightOnlyConfig()
        dtype, group = getattr(torch, f"int{self.weights}"), PerGroup(GROUP)
        if self.activations:
            return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=group)
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=group)

    def converted(self, weight: Tensor) -> Tensor:
        """torchao's integer tensor of a weight (O, I) or (O, I, kh, kw) that the configuration does not take.

        Fake quantisation: integers and scales are kept, the product is one of floating-point numbers. Symmetric scales
        for each output row, kernel position and GROUP input channels (all of them at 8 bits, or where GROUP does not
        divide their number). A convolution's activations have a scale for each row of pixels.
        """
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8Tensor,
        )

        channels = weight.shape[1]
        group = GROUP if self.weights < 8 and channels % GROUP == 0 else channels
        return IntxUnpackedToInt8Tensor.from_hp(
            weight.detach(),
            (1, group, *[1] * (weight.ndim - 2)),
            getattr(torch, f"int{self.weights}"),
            activation_quantization=ROWS if self.activations else None,
        )


def quantised(cls: Any, folder: str, scheme: Scheme, *, convolutions: bool, **where: Any) -> Any:
    """The diffusers model of `folder` (`where`: subfolder, ...) with weights by `scheme`, float32 elsewhere.

    Every linear layer, and with `convolutions` every Conv2d. It saves and opens like any other, given torchao. Raises
    UserError without torchao.
    """
    need_torchao("method.quantisation")
    from diffusers import TorchAoConfig

    left = [] if scheme.weights == 8 else unfit(cls.from_pretrained(folder, **where))
    config = TorchAoConfig(scheme.linear(), modules_to_not_convert=left)
    model = cls.from_pretrained(folder, quantization_config=config, dtype=torch.float32, **where).eval()
    for name, module in model.named_modules():
        if name in left or (convolutions and isinstance(module, nn.Conv2d)):
            module.weight = nn.Parameter(scheme.converted(module.weight), requires_grad=False)
    return model


def unfit(model: nn.Module) -> list[str]:
    """Linear layers whose input channels GROUP does not divide."""
    layers = ((k, m) for k, m in model.named_modules() if isinstance(m, nn.Linear))
    return [k for k, m in layers if m.in_features % GROUP]


def quantise_base(network: nn.Module) -> None:
    """The linear layers of a frozen network in place, integers of 8 bits, for a LoRA on it.

    Below 8 bits torchao keeps each weight in a byte all the same; no gradient passes integer activations. Raises
    UserError without torchao.
    """
    need_torchao("teacher.quantisation")
    from torchao.quantization import quantize_

    quantize_(network, Scheme(8, False).linear())


def is_quantised(network: nn.Module) -> bool:
    return any(is_traceable_wrapper_subclass(p) for p in network.parameters())


def dequantise(network: nn.Module) -> None:
    """Plain weights in place of integer ones, in place."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)


def need_torchao(key: str) -> None:
    try:
        import torchao.quantization  # noqa: F401
    except ImportError:
        raise UserError(f"{key}: needs torchao; pip install 'fewstep[quantise]', or set it to null") from None


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, those inside of quantised tensors counted."""
    return sum(t.nbytes for tensor in (*model.parameters(), *model.buffers()) for t in plain_parts(tensor))


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor
