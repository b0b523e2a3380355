"""Our Inception against torch-fidelity, torchmetrics and clean-fid with the same weights and pictures."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from fewstep.distill.errors import UserError
from fewstep.distill.metrics import inception as module
from fewstep.distill.metrics.extractor import Extractor, extract
from fewstep.distill.metrics.features import make_extractor
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.inception import (
    RESIZES,
    SHA256,
    InceptionFID,
    find_weights,
    frechet_label,
    pillow_resize,
)
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric


@pytest.fixture(scope="module")
def distance(inception: InceptionFID, picture_sets: tuple[Tensor, Tensor]) -> float:
    a, b = (Moments.of(extract(inception, x, 8)) for x in picture_sets)
    return frechet_distance(a, b)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def test_distance_equals_torch_fidelity_on_the_same_pictures(
    weights: Path, picture_sets: tuple[Tensor, Tensor], distance: float
) -> None:
    a, b = picture_sets
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(a), input2=Pictures(b), fid=True, cuda=False, verbose=False, batch_size=8,
        feature_layer_fid="64", feature_extractor_weights_path=str(weights), cache=False, save_cpu_ram=True,
    )["frechet_inception_distance"]  # fmt: skip
    assert theirs > 0.01
    assert distance == pytest.approx(theirs, rel=1e-6)


def test_distance_equals_torch_fidelity_on_the_same_features() -> None:
    draw = torch.Generator().manual_seed(5)
    a, b = (
        torch.randn(n, 64, generator=draw) * torch.linspace(0.1, 2, 64) + m for n, m in ((90, 0), (80, 1))
    )
    stats = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_distance_equals_torchmetrics_without_antialias(
    weights: Path, picture_sets: tuple[Tensor, Tensor], distance: float
) -> None:
    """torchmetrics returns float32, whose spacing is 6e-8 to 1.2e-7 of the value: within 1e-6 all the same."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        feature=64, feature_extractor_weights_path=str(weights), antialias=False
    )
    for images, real in zip(picture_sets, (True, False), strict=True):
        for batch in images.split(8):
            metric.update(batch, real=real)
    assert distance == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize("layer", [64, 192, 768, 2048])
def test_features_equal_torch_fidelity_bit_for_bit(
    weights: Path, picture_sets: tuple[Tensor, Tensor], layer: int
) -> None:
    images = picture_sets[0][:3]
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [str(layer)], feature_extractor_weights_path=str(weights)
    )
    ours = extract(InceptionFID(weights, layer=layer), images)
    assert ours.shape == (3, layer) and ours.std(0).mean() > 1e-3
    assert torch.equal(ours, network(images)[0])


@pytest.mark.parametrize("size", [(40, 48), (299, 299), (360, 300)])
def test_clean_resize_equals_clean_fid_bit_for_bit(size: tuple[int, int]) -> None:
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    theirs = np.stack([resize(picture.permute(1, 2, 0).numpy()) for picture in images])
    assert torch.equal(pillow_resize(images), torch.from_numpy(theirs).permute(0, 3, 1, 2))


def test_clean_features_use_that_resize_and_scaling(
    weights: Path, picture_sets: tuple[Tensor, Tensor]
) -> None:
    """A second route: the resized picture, rounded to no grey level, through torch-fidelity's own layers."""
    images = picture_sets[0][:3]
    network = InceptionFID(weights, layer=64, resize="clean")
    stem = FeatureExtractorInceptionV3("x", ["64"], feature_extractor_weights_path=str(weights))
    x = (pillow_resize(images) - 128) / 128
    for part in (stem.Conv2d_1a_3x3, stem.Conv2d_2a_3x3, stem.Conv2d_2b_3x3, stem.MaxPool_1):
        x = part(x)
    assert torch.allclose(extract(network, images), x.mean((2, 3)), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        float_path = network.features(images.float() / 255)
    assert torch.allclose(float_path, extract(network, images), rtol=1e-3, atol=1e-3)


def test_pytorch_rule_equals_the_formula_of_pytorch_fid() -> None:
    """pytorch-fid: ToTensor (x / 255), bilinear to 299, 2x - 1; half-pixel centres by a weight matrix here."""
    images = torch.randint(0, 256, (1, 3, 40, 48)).float()

    def matrix(source: int) -> Tensor:
        at = ((torch.arange(299, dtype=torch.float64) + 0.5) * source / 299 - 0.5).clamp_min(0)
        low = at.long().clamp_max(source - 1)
        high = (low + 1).clamp_max(source - 1)
        rows = torch.zeros(299, source, dtype=torch.float64)
        rows[torch.arange(299), low] += 1 - (at - low)
        rows[torch.arange(299), high] += at - low
        return rows

    expected = 2 * (matrix(40) @ (images.double() / 255) @ matrix(48).T) - 1
    assert (RESIZES["pytorch"][0](images) - expected).abs().max() < 1e-5


def test_the_three_rules_differ_by_more_than_rounding() -> None:
    images = torch.randint(0, 256, (1, 3, 64, 64)).float()
    a, b, c = (RESIZES[rule][0](images) for rule in ("tf1", "clean", "pytorch"))
    assert min((a - b).abs().mean(), (a - c).abs().mean(), (b - c).abs().mean()) > 1e-2
    grey = torch.full((1, 3, 299, 299), 128.0)
    values = [float(RESIZES[rule][0](grey).mean()) for rule in ("tf1", "clean", "pytorch")]
    assert values == pytest.approx([0.0, 0.0, 2 * 128 / 255 - 1], abs=1e-6)


@pytest.mark.parametrize("resize", ["tf1", "clean", "pytorch"])
def test_float_path_is_differentiable(weights: Path, resize: str) -> None:
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    out = InceptionFID(weights, layer=64, resize=resize).features(images)
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert gradient.abs().max() > 0


def test_only_pool3_of_the_published_weights_is_called_fid(weights: Path) -> None:
    network = InceptionFID(weights, layer=64)
    mark = network.weights_sha256[:8]
    assert network.name == f"inception-{mark}-64" and frechet_label(network) == f"FD-{network.name}"
    network = InceptionFID(weights, resize="clean")
    assert network.name == f"inception-{mark}-clean" and frechet_label(network) == f"FD-{network.name}"
    assert not network.is_fid
    network.weights_sha256 = SHA256
    assert network.is_fid and frechet_label(network) == "FID"
    network.num_features = 768
    assert not network.is_fid

    class Other(Extractor):
        name = "inception"

    assert frechet_label(Other()) == "FD-inception"


def test_weights_are_looked_for_and_never_fetched(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"no weights weights-inception.*run `fewstep prepare-data inception`"
    ):
        make_extractor("inception")
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(weights, checkpoints / module.SAME_FILE)
    assert find_weights() == checkpoints / module.SAME_FILE
    with pytest.raises(UserError, match=r"sha256 .*, expected 6726825d0af5; delete it"):
        make_extractor("inception-clean-192")


def test_names_make_their_extractors(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", module.sha256_of(weights))
    monkeypatch.setattr(module, "find_weights", lambda: weights)
    for name, layer, resize in (
        ("inception", 2048, "tf1"),
        ("inception-64", 64, "tf1"),
        ("inception-clean", 2048, "clean"),
        ("inception-pytorch-768", 768, "pytorch"),
    ):
        network = make_extractor(name)
        assert isinstance(network, InceptionFID)
        assert (network.name, network.num_features, network.rule) == (name, layer, resize)


def test_mistakes_are_named(tmp_path: Path, weights: Path) -> None:
    for name in ("inception-65", "inception-tf1", "inception-64-clean", "inceptionv3"):
        with pytest.raises(UserError, match="unknown name"):
            make_extractor(name)
    with pytest.raises(UserError, match="no layer 65; available: 64, 192"):
        InceptionFID(weights, layer=65)
    with pytest.raises(UserError, match="no resize 'bilinear'"):
        InceptionFID(weights, resize="bilinear")
    with pytest.raises(UserError, match="no such weights file"):
        InceptionFID(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not inception-2015-12-05 weights"):
        InceptionFID(tmp_path / "other.pth")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "few.pth")
    with pytest.raises(UserError, match="not inception-2015-12-05 weights"):
        InceptionFID(tmp_path / "few.pth")
    with pytest.raises(ValueError, match="uint8"):
        InceptionFID(weights, layer=64, resize="clean")(torch.zeros(1, 3, 8, 8))
