"""diffusers' U-Nets with other norms, among them Non-scaling LayerNorm; one file for trust_remote_code=True."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

NORM_TYPES = (
    "non_scaling", "non_scaling_last", "layer", "rms", "non_scaling_group", "non_scaling_instance",
)  # fmt: skip


class SampleNorm(nn.Module):
    """Normalises a sample over all its elements and adds a bias of its shape (arXiv 2502.01441).

    shape    of a sample: (C, H, W), in attention (C, H W), in a transformer block (tokens, C)
    scaled   with a learnable weight of that shape
    centred  subtract the mean, else divide by the root mean square alone
    """

    weight: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], scaled: bool = False, centred: bool = True):
        super().__init__()
        self.centred = centred
        self.register_parameter("weight", nn.Parameter(torch.ones(shape)) if scaled else None)
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            return F.layer_norm(x, self.bias.shape, self.weight, self.bias, 1e-5)
        return F.rms_norm(x, self.bias.shape, self.weight, 1e-5) + self.bias


def change_norms(network: nn.Module, norm_type: str, **example: torch.Tensor) -> None:
    """Puts norms of another kind in place of the network's GroupNorms and LayerNorms.

    non_scaling                        SampleNorm everywhere
    non_scaling_last                   there alone where the network ends
    layer, rms                         SampleNorm with a scale; without centring
    non_scaling_group, _instance       the network's own without their scale; groups of one channel

    example: arguments of a call for one sample on the meta device, from which the shapes are read.
    """
    if norm_type not in NORM_TYPES:
        raise ValueError(f"norm_type {norm_type!r} is not one of {', '.join(NORM_TYPES)}")
    norms: dict[str, Any] = {
        n: m for n, m in network.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)
    }
    if norm_type in ("non_scaling_group", "non_scaling_instance"):
        for norm in norms.values():
            norm.weight = None
            if norm_type == "non_scaling_instance" and isinstance(norm, nn.GroupNorm):
                norm.num_groups = norm.num_channels
        return
    if norm_type == "non_scaling_last":
        norms = {"conv_norm_out": norms["conv_norm_out"]}
    shapes = input_shapes(network, norms, example)
    for name in norms:
        parent, _, last = name.rpartition(".")
        changed = SampleNorm(shapes[name], norm_type in ("layer", "rms"), norm_type != "rms")
        setattr(network.get_submodule(parent), last, changed)


def input_shapes(
    network: nn.Module, modules: dict[str, nn.Module], example: dict[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shape of a sample at the input of each of the modules, from a call without values."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: shapes.update({name: tuple(inputs[0].shape[1:])})
        )
        for name, module in modules.items()
    ]
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    try:
        with torch.no_grad():
            functional_call(network, {k: w.to("meta") for k, w in weights.items()}, kwargs=example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def one_sample(network: Any) -> dict[str, torch.Tensor]:
    """The arguments of both U-Nets for one sample, on the meta device."""
    config = network.config
    if not isinstance(config.sample_size, int):
        raise ValueError("sample_size: a bias for each element needs a whole number")
    out = {
        "sample": torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta"),
        "timestep": torch.ones(1, device="meta"),
    }
    if network.class_embedding is not None:
        out["class_labels"] = torch.zeros(1, dtype=torch.long, device="meta")
    return out


def signed(parent: Any) -> Callable[[Any], Any]:
    """Gives a constructor its parent's signature and norm_type: diffusers reads a configuration's keys from it."""
    signature = inspect.signature(parent.__init__)
    added = inspect.Parameter("norm_type", inspect.Parameter.KEYWORD_ONLY, default="non_scaling")

    def sign(init: Any) -> Any:
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])
        return init

    return sign


class NormedUNet2DModel(UNet2DModel):
    """UNet2DModel for one resolution with `norm_type` among its arguments, one of `change_norms`."""

    @signed(UNet2DModel)
    def __init__(self, *args: Any, norm_type: str = "non_scaling", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(norm_type=norm_type)
        change_norms(self, norm_type, **one_sample(self))


class NormedUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel for one resolution with `norm_type` among its arguments, one of `change_norms`.

    Transformer blocks, which the paper's network has not, are normed over their tokens and channels.
    """

    @signed(UNet2DConditionModel)
    def __init__(self, *args: Any, norm_type: str = "non_scaling", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(norm_type=norm_type)
        states = torch.empty(1, 1, self.config.cross_attention_dim, device="meta")
        change_norms(self, norm_type, **one_sample(self), encoder_hidden_states=states)
