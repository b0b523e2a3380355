"""verify_metrics with constants that torch-fidelity computes here, and what its stamp is worth afterwards."""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch_fidelity
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.extractor import Extractor
from fewstep.distill.metrics.inception import InceptionFID, sha256_of
from fewstep.distill.protocols import published_numbers as checks
from fewstep.distill.protocols import verify
from fewstep.distill.protocols.fetched_files import RemoteFile, Store
from fewstep.distill.protocols.moments_file import moments_of, published_inception_id
from fewstep.distill.protocols.published_numbers import Check, Side
from fewstep.distill.protocols.verify import NOT_VERIFIED, is_verified, verify_metrics
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="module")
def archives(
    tmp_path_factory: pytest.TempPathFactory, picture_sets: tuple[Tensor, Tensor], weights: Path
) -> tuple[Path, Path, float]:
    """Two archives of 6 and 5 pictures and torch-fidelity's distance between them on layer 64."""
    root = tmp_path_factory.mktemp("sets")
    for name, images in zip("ab", (picture_sets[0][:6], picture_sets[1][:5]), strict=True):
        (root / name).mkdir()
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for i, picture in enumerate(images):
                file = root / name / f"{i:02d}.png"
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
                archive.write(file, f"{name}/{file.name}")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(root / "a"), input2=str(root / "b"), fid=True, cuda=False, verbose=False, cache=False,
        feature_layer_fid="64", feature_extractor_weights_path=str(weights), save_cpu_ram=True,
    )["frechet_inception_distance"]  # fmt: skip
    return root / "a.zip", root / "b.zip", float(theirs)


@pytest.fixture
def check(archives: tuple[Path, Path, float], inception: InceptionFID) -> Check:
    a, b, value = archives
    sides = (Side("zip", RemoteFile(p.name, None, "this test", option="--pictures")) for p in (a, b))
    tolerance = 1e-5 * value
    return Check("folders", *sides, {inception.name: value}, tolerance, True, "torch-fidelity, here")


@pytest.fixture
def root(tmp_path: Path, archives: tuple[Path, Path, float], check: Check) -> Path:
    """A folder of prepared files."""
    for file, path in zip(check.files, archives[:2], strict=True):
        Store(tmp_path / "folders").place(file, path)
    return tmp_path


def test_a_reproduced_constant_is_stamped(root: Path, check: Check, inception: InceptionFID) -> None:
    assert is_verified(inception, directory=root) == NOT_VERIFIED
    (outcome,) = verify_metrics(
        extractor=inception, checks={"folders": check}, directory=root, progress=False
    )
    (expected,) = check.values.values()
    assert outcome.passed and outcome.value == pytest.approx(expected, rel=1e-5)
    said = is_verified(inception, directory=root)
    assert said.startswith(f"verified here: folders {expected:.7g}"[:-2])
    assert f"torch-fidelity {torch_fidelity.__version__}" in said
    (entry,) = json.loads((root / "verified.json").read_text())
    assert entry["weights_sha256"] == inception.weights_sha256 and entry["device"] == "cpu"
    assert set(entry["files"]) == {"a.zip", "b.zip"} and set(entry["versions"]) >= {"torch", "code"}


def test_a_wrong_constant_fails_with_both_numbers_and_voids_the_stamp(
    root: Path, check: Check, inception: InceptionFID
) -> None:
    (right,) = verify_metrics(extractor=inception, checks={"folders": check}, directory=root, progress=False)
    wrong = right.expected * 1.01
    planted = replace(check, values={inception.name: wrong})
    said = re.escape(f"computed {right.value:.7g}, published {wrong:.7g}")
    with pytest.raises(UserError, match=rf"{said} .*not comparable"):
        verify_metrics(extractor=inception, checks={"folders": planted}, directory=root, progress=False)
    said = is_verified(inception, directory=root)
    assert said == f"{NOT_VERIFIED} (folders gave {right.value:.7g}, not {wrong:.7g})"


def test_the_command_exits_with_2_on_a_wrong_constant(
    root: Path,
    check: Check,
    inception: InceptionFID,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(root / "cache"))
    (root / "cache").mkdir()
    (root / "cache" / "protocols").symlink_to(root)
    monkeypatch.setattr(verify, "make_extractor", lambda name: inception)
    (value,) = check.values.values()
    monkeypatch.setattr(checks, "CHECKS", {"folders": replace(check, values={inception.name: value + 1})})
    assert main(["verify-metrics", "folders", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert f"computed {value:.5g}"[:-1] in captured.err and f"published {value + 1:.5g}"[:-1] in captured.err
    monkeypatch.setattr(checks, "CHECKS", {"folders": check})
    assert main(["verify-metrics", "--quiet"]) == 0
    assert f"folders {inception.name}: computed" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["torch", "torch-fidelity"])
def test_other_versions_void_the_stamp(
    root: Path, check: Check, inception: InceptionFID, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    verify_metrics(extractor=inception, checks={"folders": check}, directory=root, progress=False)
    real = verify.version
    monkeypatch.setattr(verify, "version", lambda name: "9.9" if name == package else real(name))
    said = is_verified(inception, directory=root)
    assert said.startswith(f"{NOT_VERIFIED} (stamped with {package} {real(package)}, this is 9.9")


def test_other_code_voids_the_stamp(root: Path, check: Check, inception: InceptionFID) -> None:
    verify_metrics(extractor=inception, checks={"folders": check}, directory=root, progress=False)
    stamp = root / "verified.json"
    entries = json.loads(stamp.read_text())
    entries[0]["versions"]["code"] = "0" * 12
    stamp.write_text(json.dumps(entries))
    assert is_verified(inception, directory=root).startswith(f"{NOT_VERIFIED} (stamped with code 000000")


def test_other_weights_layers_and_rules_are_not_verified(
    root: Path, check: Check, inception: InceptionFID, weights: Path
) -> None:
    verify_metrics(extractor=inception, checks={"folders": check}, directory=root, progress=False)
    assert is_verified(InceptionFID(weights, layer=64), directory=root).startswith("verified here")
    for layer, resize in ((192, "tf1"), (64, "clean")):
        other = InceptionFID(weights, layer=layer, resize=resize)
        assert is_verified(other, directory=root) == NOT_VERIFIED
    changed = InceptionFID(weights, layer=64)
    changed.weights_sha256 = "0" * 64
    assert is_verified(changed, directory=root) == NOT_VERIFIED


def test_what_is_not_published_alone_verifies_nothing(
    root: Path, check: Check, inception: InceptionFID
) -> None:
    own = replace(check, published=False)
    verify_metrics(extractor=inception, checks={"folders": own}, directory=root, progress=False)
    assert is_verified(inception, directory=root) == NOT_VERIFIED


def test_statistics_stand_for_pictures(
    root: Path, check: Check, inception: InceptionFID, archives: tuple[Path, Path, float]
) -> None:
    path = root / "b.npz"
    moments = moments_of(inception, check.b.pictures(archives[1]), progress=False)
    np.savez(path, mu=moments.mean.numpy(), sigma=moments.matrix.numpy())
    side = Side("statistics", RemoteFile("b.npz", None, "this test"), 5)
    mixed = replace(check, name="mixed", b=side, tolerance=1e-4 * archives[2])
    for file, given in zip(mixed.files, (archives[0], path), strict=True):
        Store(root / "mixed").place(file, given)
    (outcome,) = verify_metrics(
        ["mixed"], extractor=inception, checks={"mixed": mixed}, directory=root, progress=False
    )
    assert outcome.passed


def test_nothing_prepared_is_said_with_its_remedy(
    tmp_path: Path, check: Check, inception: InceptionFID
) -> None:
    known = {"folders": check}
    with pytest.raises(UserError, match="nothing is prepared to verify; run `fewstep prepare-data folders`"):
        verify_metrics(extractor=inception, checks=known, directory=tmp_path)
    with pytest.raises(UserError, match=r"folders lacks .*\.zip; run `fewstep prepare-data folders`"):
        verify_metrics(["folders"], extractor=inception, checks=known, directory=tmp_path)
    with pytest.raises(UserError, match="no check 'fid'; available: folders"):
        verify_metrics(["fid"], checks=known, directory=tmp_path)
    for text in ("{", "null", '[{"check": "folders"}]', "[" * 100_000):
        (tmp_path / "verified.json").write_text(text)
        with pytest.raises(
            UserError, match=r"verified\.json: .*: delete it and run `fewstep verify-metrics`"
        ):
            is_verified(inception, directory=tmp_path)


def test_protocol_names_ask_for_their_extractor(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stamp of the clean rule verifies the protocols that use it, if the published weights are here."""
    entry = {
        "check": "x", "extractor_id": published_inception_id("clean"), "published": True, "passed": True,
        "value": 1.0, "expected": 1.0, "versions": verify._versions(),
    }  # fmt: skip
    (tmp_path / "verified.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(verify, "find_weights", lambda: weights)
    names = ("coco2014-30k", "coco2017-5k", "inception-clean")
    assert {is_verified(name, directory=tmp_path) for name in names} == {NOT_VERIFIED}
    monkeypatch.setattr(verify, "SHA256", sha256_of(weights))
    assert all(is_verified(name, directory=tmp_path).startswith("verified here: x 1 (1)") for name in names)
    for name in ("cifar10-50k", "imagenet64-50k", "imagenet256-50k", "mjhq-5k", "inception", "efflite0-128"):
        assert is_verified(name, directory=tmp_path) == NOT_VERIFIED

    class Other(Extractor):
        name, weights_sha256, layer, resize = "other", "", "", ""

    assert is_verified(Other(), directory=tmp_path) == NOT_VERIFIED
