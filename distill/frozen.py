"""Parameters that a loss must not train: kept out of graphs, moved in the precision that they need, and told apart."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import PreTrainedModel

from .quantise import plain_parts


class Frozen(nn.Module):
    """Stays in evaluation mode and without gradients of its own, also as a part of a method that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def full_precision(like: Tensor) -> AbstractContextManager:
    """Within it nothing on the device of `like` is cast by autocast."""
    kind = like.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it graphs leave these parameters out; gradients still pass through to what came before them."""
    held = [p for p in parameters if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextmanager
def without_adapter(network: Any) -> Iterator[None]:
    """Within it a network answers without the LoRA that may have been added to it."""
    if not hasattr(network, "peft_config"):
        yield
        return
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


def move_frozen(module: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a module and casts its parameters that are not trained.

    In float32 stay: an autoencoder whose config asks for it (force_upcast), that of Wan (as its authors run it), and
    what a class names in _keep_in_fp32_modules, those of transformers beside float16 alone.
    """
    module.to(device)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if isinstance(module, PreTrainedModel) and dtype != torch.float16:
        kept = set()
    whole = isinstance(module, AutoencoderKLWan) or getattr(module.config, "force_upcast", False)
    for name, p in module.named_parameters():
        if not p.requires_grad:  # a LoRA trained on this network stays in float32
            p.data = p.data.to(torch.float32 if whole or kept & set(name.split(".")) else dtype)


class Offloaded:
    """Modules that wait in the CPU's memory; one that is called moves to `device` and stays there until `rest`.

    diffusers' autoencoders also move where they encode or decode.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device):
        self.hooks = [cpu_offload_with_hook(m, device)[1] for m in modules]
        self.rest()

    def rest(self) -> None:
        for hook in self.hooks:
            hook.offload()

    def remove(self) -> None:
        """Leaves the modules on the CPU, as they were before."""
        self.rest()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def weights_hash(module: nn.Module) -> str:
    """A short hash of all weights, so that another network is never taken for this one."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        for part in plain_parts(value.detach()):
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()
