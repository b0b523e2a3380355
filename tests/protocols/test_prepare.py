"""prepare_data and what opens from it without a network, with small protocols served on this machine."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.extractor import Extractor, extract
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.inception import SHA256, InceptionFID
from fewstep.distill.protocols import prepare
from fewstep.distill.protocols.archives import Crop
from fewstep.distill.protocols.fetched_files import GIVEN, PINNED, PUBLISHED, RemoteFile
from fewstep.distill.protocols.moments_file import (
    import_statistics,
    moments_of,
    published_inception_id,
    read_statistics,
    save_statistics,
)
from fewstep.distill.protocols.prepare import load_prompts, load_reference, prepare_data
from fewstep.distill.protocols.standards import Standard, Stated
from fewstep.distill.protocols.table import COCO2014, IMAGENET256, MJHQ, STANDARDS
from PIL import Image
from torch import Tensor


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        return None


class Pool3(Extractor):
    """Stands for the network that a published statistics file belongs to, without its weights."""

    name, num_features, weights_sha256 = "inception", 2048, SHA256
    layer, resize = published_inception_id("tf1").split(" | ")[1:]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at; the cache is empty and the Inception weights are a small file."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (folder / prepare.FILE).write_bytes(b"weights")
    known = hashlib.sha256(b"weights").hexdigest()
    weights = replace(prepare.WEIGHTS, address=f"{address}/{prepare.FILE}", sha256=known)
    monkeypatch.setattr(prepare, "WEIGHTS", weights)
    yield folder, address
    server.shutdown()
    server.server_close()


def moved(standard: Standard, address: str) -> Standard:
    """The protocol with its files at another address and without published hashes."""

    def there(stated: Stated[RemoteFile]) -> Stated[RemoteFile]:
        name = stated.value.name
        return replace(stated, value=replace(stated.value, address=f"{address}/{name}", sha256=None))

    prompts = standard.prompts and there(standard.prompts)
    return replace(standard, reference=there(standard.reference), prompts=prompts)


def covariance(size: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=size), np.diag(draw.uniform(0.5, 2, size=size))


def test_a_published_protocol_opens_from_what_was_fetched(
    site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, address = site
    standard = moved(IMAGENET256, address)
    monkeypatch.setitem(STANDARDS, "imagenet256-50k", standard)
    mu, sigma = covariance(2048)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", mu=mu, sigma=sigma, mu_s=mu[:7], arr_0=mu)
    with pytest.raises(UserError, match="is not prepared; run `fewstep prepare-data imagenet256-50k`"):
        load_reference(standard, Pool3())
    assert main(["prepare-data", "imagenet256-50k", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "pinned here, not published" in printed and "hash as published" in printed
    assert "quantisation: truncate is our choice, not established" in printed
    reference = load_reference(standard, Pool3())
    assert reference.moments.n == 1_281_167
    assert np.array_equal(reference.moments.mean.numpy(), mu)
    assert np.array_equal(reference.moments.matrix.numpy(), sigma)
    file = folder / "VIRTUAL_imagenet256_labeled.npz"
    assert reference.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()
    assert [f.origin for f in prepare_data("imagenet256-50k", progress=False)] == [PINNED, PUBLISHED]
    foreign = Pool3()
    foreign.weights_sha256 = "0" * 64
    with pytest.raises(UserError, match="its statistics are of extractor inception, not of inception"):
        load_reference(standard, foreign)


def test_published_statistics_refuse_a_foreign_network(
    site: tuple[Path, str], inception: InceptionFID
) -> None:
    with pytest.raises(UserError, match=rf"of extractor inception, not of {inception.name}; use that one"):
        load_reference(STANDARDS["cifar10-50k"], inception)


def pictures_standard(address: str) -> Standard:
    """coco2014-30k with 10 real pictures, 3 captions and side 32."""
    standard = moved(COCO2014, address)
    return replace(
        standard,
        num_images=Stated(3, "here"),
        n_ref=Stated(10, "here"),
        crop=Stated(Crop(square=True, side=32), "here"),
    )


def write_zip(path: Path, names: list[str], images: Tensor) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, picture in zip(names, images, strict=True):
            with archive.open(name, "w") as file:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png")


def test_a_protocol_of_pictures_computes_its_statistics_once(
    site: tuple[Path, str],
    inception: InceptionFID,
    picture_sets: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, address = site
    standard = pictures_standard(address)
    monkeypatch.setitem(STANDARDS, standard.name, standard)
    images = picture_sets[0][:10]
    write_zip(folder / "val2014.zip", [f"val2014/{i:02d}.jpg" for i in range(10)], images)
    (folder / "captions_coco14_test.txt").write_text("a\nb\nc\nd\n")
    prepare_data(standard.name, progress=False)
    assert load_prompts(standard) == ["a", "b", "c"]
    reference = load_reference(standard, inception, batch_size=4, progress=False)
    direct = Moments.of(extract(inception, standard.crop.value(images), 4))
    assert frechet_distance(reference.moments, direct) < 1e-6 * direct.trace
    assert reference.moments.n == 10
    monkeypatch.setattr(prepare, "moments_of", None)
    again = load_reference(standard, inception, progress=False)
    assert again.id == reference.id and again.sha256 == reference.sha256
    assert torch.equal(again.moments.mean, reference.moments.mean)


def test_another_number_of_pictures_is_not_the_reference(
    site: tuple[Path, str],
    inception: InceptionFID,
    picture_sets: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, address = site
    standard = pictures_standard(address)
    monkeypatch.setitem(STANDARDS, standard.name, standard)
    write_zip(folder / "mine.zip", ["val2014/1.jpg", "val2014/2.jpg"], picture_sets[0][:2])
    (folder / "captions.txt").write_text("a\nb\nc\n")
    done = prepare_data(
        standard.name, pictures=folder / "mine.zip", prompts=folder / "captions.txt", progress=False
    )
    assert [f.origin for f in done] == [GIVEN, GIVEN, PUBLISHED]
    with pytest.raises(UserError, match=r"2 pictures, protocol coco2014-30k has 10; give --pictures"):
        load_reference(standard, inception, progress=False)


def test_mjhq_takes_the_pictures_of_its_prompts(
    site: tuple[Path, str],
    inception: InceptionFID,
    picture_sets: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, address = site
    standard = replace(moved(MJHQ, address), num_images=Stated(4, "here"), n_ref=Stated(4, "here"))
    monkeypatch.setitem(STANDARDS, "mjhq-5k", standard)
    names = list("jihgfedcba")
    write_zip(folder / "mjhq30k_imgs.zip", [f"x/{name}.jpg" for name in names], picture_sets[0][:10])
    (folder / "meta_data.json").write_text(json.dumps({n: {"prompt": n, "category": "x"} for n in names}))
    prepare_data("mjhq-5k", progress=False)
    assert load_prompts(standard) == ["b", "c", "e", "i"]
    reference = load_reference(standard, inception, progress=False)
    chosen = picture_sets[0][[names.index(n) for n in "bcei"]]
    assert frechet_distance(reference.moments, Moments.of(extract(inception, chosen))) < 1e-6


def test_without_a_network_it_is_one_line_and_what_was_given_stays(
    site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = site
    standard = moved(COCO2014, "http://127.0.0.1:1")
    monkeypatch.setitem(STANDARDS, standard.name, standard)
    captions = folder / "captions.txt"
    captions.write_text("a\n" * 30_000)
    arguments = ["prepare-data", standard.name, "--prompts", str(captions), "--quiet"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "val2014.zip: http://127.0.0.1:1/val2014.zip cannot be reached" in said
    assert "give --pictures PATH" in said
    assert len(load_prompts(standard)) == 30_000


def test_given_statistics_stand_in_for_pictures(
    site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = site
    standard = replace(pictures_standard(address), extractor=Stated("inception", "here"))
    monkeypatch.setitem(STANDARDS, standard.name, standard)
    (folder / "captions_coco14_test.txt").write_text("a\nb\nc\n")
    mu, sigma = covariance(2048)
    np.savez(folder / "mine.npz", mu=mu, sigma=sigma)
    done = prepare_data(standard.name, statistics=folder / "mine.npz", progress=False)
    assert {f.name for f in done} == {"given_statistics.npz", "captions_coco14_test.txt", prepare.FILE}
    assert np.array_equal(load_reference(standard, Pool3()).moments.mean.numpy(), mu)
    assert prepare_data(standard.name, progress=False)[0].origin == GIVEN
    for array, said in (
        ({"mu": mu[:64], "sigma": sigma[:64, :64]}, "statistics of 64 features, pool3 has 2048"),
        ({"mean": mu}, "has none of mu, sigma"),
        ({"mu": mu, "sigma": sigma[:, :9]}, r"covariance \(2048, 9\)"),
        ({"mu": mu, "sigma": sigma * np.nan}, "not finite"),
        ({"mu": mu, "sigma": sigma + np.triu(np.ones_like(sigma))}, "sigma is not symmetric"),
    ):
        np.savez(folder / "bad.npz", **array)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            prepare_data(standard.name, statistics=folder / "bad.npz", progress=False)
    both = {"statistics": folder / "mine.npz", "pictures": folder / "val2014.zip"}
    with pytest.raises(UserError, match="--pictures gives the reference too; leave one out"):
        prepare_data(standard.name, **both, progress=False)
    write_zip(folder / "val2014.zip", ["val2014/1.jpg"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    done = prepare_data(standard.name, pictures=folder / "val2014.zip", progress=False)
    assert {f.name for f in done} == {"val2014.zip", "captions_coco14_test.txt", prepare.FILE}
    assert not (done[0].path.parent / "given_statistics.npz").exists()


def test_options_and_names_without_use_are_refused(site: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--prompts .*: cifar10-50k has no use for it"):
        prepare_data("cifar10-50k", prompts=tmp_path / "p")
    with pytest.raises(UserError, match=r"^--statistics .*: inception has no use for it"):
        prepare_data("inception", statistics=tmp_path / "p")
    with pytest.raises(UserError, match="no 'cifar'; available: cifar10-50k, "):
        prepare_data("cifar")
    with pytest.raises(UserError, match=r"--weights .*nothing: no such file"):
        prepare_data("inception", weights=tmp_path / "nothing")


def test_weights_are_fetched_given_or_found_in_torchs_cache(site: tuple[Path, str], tmp_path: Path) -> None:
    (fetched,) = prepare_data("inception", progress=False)
    assert fetched.path == tmp_path / "cache" / "protocols" / "inception" / prepare.FILE
    fetched.path.unlink()
    (tmp_path / "wrong.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="is published; try again or give --weights PATH"):
        prepare_data("inception", weights=tmp_path / "wrong.pth")
    hub = tmp_path / "hub" / "checkpoints" / prepare.FILE
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"weights")
    (found,) = prepare_data("inception", progress=False)
    assert found.path == hub
    hub.write_bytes(b"changed")
    (fetched,) = prepare_data("inception", progress=False)
    assert fetched.path != hub and fetched.path.read_bytes() == b"weights"


def test_statistics_files_state_what_they_are_of(tmp_path: Path) -> None:
    moments = Moments.of(torch.randn(30, 5, dtype=torch.float64))
    path = tmp_path / "ours.npz"
    save_statistics(path, moments, "cats | crop none")
    got = read_statistics(path, "cats | crop none")
    assert got.moments.n == 30 and torch.equal(got.moments.matrix, moments.matrix)
    with pytest.raises(UserError, match=r"statistics of \[cats \| crop none\], not of \[dogs\]"):
        read_statistics(path, "dogs")
    with pytest.raises(UserError, match=r"statistics of \[cats"):
        import_statistics(path, stated_id="dogs", n=30)
    plain = tmp_path / "plain.npz"
    np.savez(plain, ref_mu=moments.mean.numpy(), ref_sigma=moments.matrix.numpy())
    with pytest.raises(UserError, match="states no id and number of pictures"):
        read_statistics(plain, "cats")
    with pytest.raises(UserError, match="explicitly stated id"):
        import_statistics(plain, stated_id="", n=30)
    with pytest.raises(UserError, match="has ref_mu, ref_sigma, not mu and sigma"):
        import_statistics(plain, stated_id="cats", n=30)
    got = import_statistics(plain, stated_id="cats", n=30, keys=("ref_mu", "ref_sigma"))
    assert (got.id, got.moments.n) == ("cats", 30)
    assert frechet_distance(got.moments, moments) < 1e-9 * moments.trace
    plain.write_bytes(b"cut")
    with pytest.raises(UserError, match="no readable"):
        import_statistics(plain, stated_id="cats", n=30)


class Means(Extractor):
    name, num_features, weights_sha256, resize, layer = "means", 3, "", "", ""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.scale


@pytest.mark.parametrize("count", [3, 4, 17])
def test_moments_of_pictures_do_not_depend_on_batches(count: int) -> None:
    images = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8)
    expected = Moments.of(extract(Means(), images))
    for batch_size in (1, 2, 5, 64):
        got = moments_of(Means(), iter(images), batch_size=batch_size, progress=False)
        assert got.n == count and (got.rows is None) == (count > 3)
        assert torch.allclose(got.mean, expected.mean, rtol=1e-6)
        assert torch.allclose(got.matrix, expected.matrix, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        moments_of(Means(), iter(images[:1]), progress=False)
