"""Fashion-MNIST and other IDX files: read, found, fetched, and what may be wrong with them."""

import gzip
import hashlib
import os
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fewstep.distill.data import idx, named
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image

pytestmark = pytest.mark.usefixtures("bare_machine")

REAL = Path(os.environ.get("FEWSTEP_DATA", "/usr/share/datasets")).expanduser() / "fashion-mnist"
NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
LABELS = {"train": [9, 0, 3, 8, 1, 2], "test": [5, 9, 4]}


def grey(split):
    seed = list(LABELS).index(split)
    return np.random.default_rng(seed).integers(0, 256, (len(LABELS[split]), 28, 28), np.uint8)


def idx_bytes(array, magic=None):
    header = bytes((0, 0, 8, array.ndim)) if magic is None else magic
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if ending else bytes
    for split in LABELS:
        stem = "train" if split == "train" else "t10k"
        labels = np.array(LABELS[split], np.uint8)
        (folder / f"{stem}-images-idx3-ubyte{ending}").write_bytes(pack(idx_bytes(grey(split))))
        (folder / f"{stem}-labels-idx1-ubyte{ending}").write_bytes(pack(idx_bytes(labels)))
    return folder


def refused(name, *words, **arguments):
    with pytest.raises(UserError) as caught:
        load_data(str(name), **{"resolution": 32, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("split", LABELS)
def test_fashion_is_grey_in_three_channels_with_a_border_of_two_zero_pixels(
    tmp_path, monkeypatch, split, ending
):
    write_idx(tmp_path / "fashion-mnist", ending)
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    data = load_data("fashion-mnist", split=split, resolution=32)
    expected = np.zeros((len(LABELS[split]), 3, 32, 32), np.uint8)
    for i, picture in enumerate(grey(split)):
        for channel in range(3):
            for row in range(28):
                expected[i, channel, 2 + row, 2:30] = picture[row]
    assert data.images().dtype == torch.uint8 and np.array_equal(data.images().numpy(), expected)
    assert np.array_equal(data.images([2, 0]).numpy(), expected[[2, 0]])
    assert data.images().is_contiguous() and data.images([1]).is_contiguous()
    assert data.captions == [NAMES[label] for label in LABELS[split]]
    assert data.rows == [{"category": caption} for caption in data.captions]
    assert data.labels == LABELS[split] and data.classes == tuple(NAMES)


def test_other_resolutions_are_resized_from_the_picture_with_its_border(tmp_path):
    folder = str(write_idx(tmp_path / "fashion"))
    whole, small = (load_data(folder, resolution=r).images([1])[0] for r in (32, 20))
    expected = Image.fromarray(whole.permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(small.permute(1, 2, 0).numpy(), np.array(expected))


def test_captions_are_class_names_or_nothing(tmp_path):
    folder = str(write_idx(tmp_path / "fashion"))
    plain, labelled = (load_data(folder, resolution=32, caption_column=c) for c in ("text", "label"))
    assert plain.captions == labelled.captions and set(plain.captions) <= set(NAMES)
    empty = load_data(folder, resolution=32, caption_column=None)
    assert empty.captions == [""] * 6 and empty.labels == LABELS["train"]
    refused(folder, "'subcategory'", "text or label", caption_column="subcategory")
    refused(folder, "'holdout'", "train, test", split="holdout")
    refused(folder, "'picture'", "set image_column to image", image_column="picture")


@pytest.mark.parametrize("below", [".", "raw", "FashionMNIST/raw"])
def test_a_folder_of_idx_files_is_recognised(tmp_path, below):
    write_idx(tmp_path / "fashion" / below, ".gz")
    assert load_data(str(tmp_path / "fashion"), resolution=32).labels == LABELS["train"]


@pytest.mark.parametrize(
    ("folder", "classes"),
    [
        ("FashionMNIST/raw", NAMES),
        ("fashion/mnist", list("0123456789")),
        ("mnist/fashion", NAMES),
        ("MNIST/raw", list("0123456789")),
        ("some", list("0123456789")),
    ],
)
def test_classes_of_idx_files_follow_the_nearest_folder_that_says(folder, classes, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    data = load_data(str(write_idx(root / folder)), resolution=32, split="test")
    assert data.classes == tuple(classes)
    assert data.captions == [classes[label] for label in LABELS["test"]]


def test_classes_follow_the_labels_where_no_folder_says(tmp_path_factory, monkeypatch):
    folder = write_idx(tmp_path_factory.mktemp("data"), ".gz")
    known = {hashlib.sha256(bytes(labels)).hexdigest() for labels in LABELS.values()}
    monkeypatch.setattr(idx, "FASHION_LABELS", known)
    assert load_data(str(folder), resolution=32).captions[:2] == ["ankle boot", "t-shirt"]
    monkeypatch.setattr(idx, "FASHION_LABELS", {sorted(known)[0]})
    assert load_data(str(folder), resolution=32).captions[:2] == ["9", "0"]


def test_two_data_sets_below_a_folder_are_not_chosen_between(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    write_idx(tmp_path / "FashionMNIST" / "raw")
    refused(tmp_path, str(tmp_path / "MNIST" / "raw"), str(tmp_path / "FashionMNIST" / "raw"), "one of")


def test_first_place_with_the_files_is_taken(tmp_path, monkeypatch):
    places = {
        "own": tmp_path / "own" / "fashion-mnist",
        "package": tmp_path / "fashion-mnist",
        "cache": tmp_path / "cache" / "data" / "fashion-mnist" / "FashionMNIST" / "raw",
    }
    for i, folder in enumerate(places.values()):
        write_idx(folder)
        labels = np.full(6, i, np.uint8)
        (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    for i, folder in enumerate(places.values()):
        monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "own"))
        assert load_data("fashion-mnist", resolution=32).labels == [i] * 6
        for file in folder.iterdir():
            file.unlink()
        if i == 0:
            refused("fashion-mnist", str(folder), "no files of fashion-mnist")
            folder.rmdir()
    refused("fashion-mnist", "fashion-mnist: is not on this machine")


def test_nothing_anywhere_names_all_remedies(tmp_path, monkeypatch):
    remedies = ["HF_HUB_OFFLINE", "FEWSTEP_DATA", "path of their folder", "data.name"]
    refused("fashion-mnist", "fashion-mnist: ", "apt install dataset-fashion-mnist", *remedies)
    refused("cifar10", "cifar10: ", *remedies)
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "typo"))
    refused("cifar10", "FEWSTEP_DATA", str(tmp_path / "typo"))
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    write_idx(tmp_path / "fashion-mnist" / "MNIST" / "raw")
    refused("fashion-mnist", "no files of fashion-mnist")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kept", [0, 3, 15, 16, 100, -1])
def test_a_file_cut_short_is_named(tmp_path, ending, kept):
    path = write_idx(tmp_path, ending) / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, str(path), "cut short", "fetch it again")
    assert len(load_data(str(tmp_path), split="test", resolution=32)) == 3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train-images-idx3-ubyte", idx_bytes(grey("train")) + b"\0", ["4705 bytes", "6 x 28 x 28"]),
        ("train-images-idx3-ubyte", idx_bytes(grey("train"), b"\0\0\x0d\3"), ["00000d03", "3 axes"]),
        (
            "train-images-idx3-ubyte",
            idx_bytes(np.array(LABELS["train"] * 9, np.uint8)),
            ["00000801", "3 axes"],
        ),
        ("train-images-idx3-ubyte", idx_bytes(grey("train")[:, 1:]), ["6 x 27 x 28", "28 x 28"]),
        ("train-images-idx3-ubyte", idx_bytes(grey("train")[:0]), ["0 x 28 x 28"]),
        ("train-images-idx3-ubyte", idx_bytes(grey("train")[1:]), ["5 pictures", "6 labels"]),
        ("train-labels-idx1-ubyte", idx_bytes(np.array([0, 1, 2, 10, 0, 0], np.uint8)), ["label 3 is 10"]),
        ("train-labels-idx1-ubyte", None, ["no train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"]),
    ],
)
def test_wrong_files_are_named(tmp_path, file, content, words):
    path = write_idx(tmp_path) / file
    path.unlink() if content is None else path.write_bytes(content)
    refused(tmp_path, str(tmp_path if content is None else path), *words)


def test_damaged_gzip_is_named(tmp_path):
    path = write_idx(tmp_path, ".gz") / "t10k-images-idx3-ubyte.gz"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    refused(tmp_path, str(path), "cannot be read", split="test")
    path.write_bytes(idx_bytes(grey("test")))
    refused(tmp_path, str(path), "cannot be read", "gzip", split="test")


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    write_idx(tmp_path / "fashion")
    read, real = [], idx.read_idx
    monkeypatch.setattr(idx, "read_idx", lambda path, axes: read.append(path.name) or real(path, axes))
    first = load_data(str(tmp_path / "fashion"), resolution=32)
    first.images().zero_()
    first.rows[0]["category"] = first.captions[0] = "changed"
    again = load_data(str(tmp_path / "fashion"), resolution=32)
    assert read == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    assert again.images().any() and again.captions[0] == again.rows[0]["category"] == "ankle boot"
    labels = tmp_path / "fashion" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.array([4] * 6, np.uint8)))
    os.utime(labels, ns=(1, 1))
    assert load_data(str(tmp_path / "fashion"), resolution=32).labels == [4] * 6


def test_fashion_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch, network):
    address, broken = network
    site = write_idx(tmp_path / "site", ".gz")
    md5 = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in sorted(site.iterdir())]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", md5)
    broken.add("/train-images-idx3-ubyte.gz")
    cache = tmp_path / "cache" / "data"
    remedies = ("cannot be fetched", "apt install dataset-fashion-mnist", "FEWSTEP_DATA")
    refused("fashion-mnist", *remedies)
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == []
    killed = write_idx(cache / "fashion-mnist.part" / "FashionMNIST" / "raw")
    (killed / "t10k-labels-idx1-ubyte").write_bytes(b"")  # torchvision would take it for done
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("fashion-mnist", "HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    broken.clear()
    assert load_data("fashion-mnist", resolution=32).labels == LABELS["train"]
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == ["fashion-mnist"]
    for file in site.iterdir():
        file.unlink()
    data = load_data("fashion-mnist", split="test", resolution=32)
    assert np.array_equal(data.images()[:, 1, 2:30, 2:30].numpy(), grey("test"))


def test_a_silent_server_is_given_up(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(named, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [address])
        start = time.monotonic()
        refused("fashion-mnist", "cannot be fetched", "timed out")
    assert time.monotonic() - start < 10 and socket.getdefaulttimeout() is None


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there: apt install dataset-fashion-mnist")
def test_real_fashion_mnist():
    train, test = (load_data(str(REAL), split=s, resolution=32) for s in LABELS)
    assert train.classes == test.classes == tuple(NAMES)
    pixels = [data.images()[:, 0, 2:30, 2:30].flatten(1).double() for data in (train, test)]
    for data, inner, per_class, expected in zip(
        (train, test), pixels, (6_000, 1_000), ((72.940, 90.021), (73.147, 89.873)), strict=True
    ):
        assert Counter(data.captions) == dict.fromkeys(NAMES, per_class)
        assert (inner.mean().item(), inner.std().item()) == pytest.approx(expected, abs=5e-4)
    centres = torch.zeros(10, 28 * 28, dtype=torch.double)
    centres.index_add_(0, torch.tensor(train.labels), pixels[0]).div_(6_000)
    nearest = torch.cdist(pixels[1], centres).argmin(1)
    assert (nearest == torch.tensor(test.labels)).float().mean() > 0.6  # 0.1 if labels and pictures disagree
