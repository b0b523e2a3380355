"""A randomly initialised inception-2015-12-05 in a file, and pictures of two kinds."""

import io
from pathlib import Path

import pytest
import torch
from fewstep.distill.metrics.inception import InceptionFID
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Untrained(FeatureExtractorInceptionV3):
    """The architecture before any weights are loaded."""

    def load_state_dict(self, *arguments: object, **options: object) -> None:
        return None


def save_random_weights(path: Path, seed: int) -> Path:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Untrained("random", ["2048"], feature_extractor_weights_path=nothing)
    draw = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draw)
        elif name.endswith(("bn.weight", "bn.bias", "running_mean")):
            value.add_(torch.randn(value.shape, generator=draw), alpha=0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_weights(tmp_path_factory.mktemp("weights") / "random.pth", 0)


@pytest.fixture(scope="session")
def inception(weights: Path) -> InceptionFID:
    """Layer 64, TF1 resize."""
    return InceptionFID(weights, layer=64)


@pytest.fixture(scope="session")
def picture_sets() -> tuple[Tensor, Tensor]:
    """72 and 66 pictures uint8 (N, 3, 40, 48): noise of changing strength over gradients of changing colour."""
    draw = torch.Generator().manual_seed(3)
    ramp = torch.linspace(0, 1, 40)[:, None] * torch.linspace(0.2, 1, 48)
    out = []
    for count, strength, light in ((72, 60, 255), (66, 15, 20)):
        colour = torch.rand(count, 3, 1, 1, generator=draw) * light
        noise = torch.randn(count, 3, 40, 48, generator=draw) * strength
        scale = torch.rand(count, 1, 1, 1, generator=draw)
        out.append((colour * ramp + noise * scale).round().clamp(0, 255).byte())
    return out[0], out[1]
