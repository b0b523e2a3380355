"""Parameters that a loss must not train: kept out of graphs, moved in the precision that they need, and told apart."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..readers import parse_json
from .quantise import plain_parts

# What files of tokenizers hold beside their content: where they lay, and how they were called last.
PASSING = {
    "is_local", "local_files_only", "max_length", "name_or_path", "pad_to_multiple_of", "padding", "stride",
    "transformers_version", "truncation", "truncation_strategy",
}  # fmt: skip


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


def content_hash(*parts: Any) -> str:
    """32 hex digits of all that networks and tokenizers compute with, wherever they were loaded from.

    Of a network its class, configuration and tensors with their names, types and shapes; of anything else (a tokenizer)
    its class and the files that it saves. None stands for a part that is not there.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{type(part).__name__}\n".encode())
        if isinstance(part, nn.Module):
            _hash_network(part, digest)
        elif part is not None:
            _hash_files(part, digest)
    return digest.hexdigest()[:32]


def _hash_network(network: nn.Module, digest: Any) -> None:
    config: Any = getattr(network, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    values = {k: v for k, v in values.items() if k[0] != "_" and k != "transformers_version"}
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, value in network.state_dict().items():
        for tensor in plain_parts(value.detach()) if isinstance(value, Tensor) else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _hash_files(part: Any, digest: Any) -> None:
    with TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.suffix == ".json":
                    values = parse_json(content, path)
                    kept = {k: v for k, v in values.items() if k not in PASSING}
                    content = json.dumps(kept, sort_keys=True).encode()
                digest.update(f"{path.name} {len(content)}\n".encode())
                digest.update(content)


def weights_hash(module: nn.Module) -> str:
    """A short hash of the values of all weights, whatever their precision, by which an export names a network."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        for part in plain_parts(value.detach()):
            digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()
