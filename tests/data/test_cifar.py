"""CIFAR-10 out of tiny batches and archives that torchvision takes for the published ones."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError

pytestmark = pytest.mark.usefixtures("bare_machine")

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COUNTS = {"train": 10, "test": 3}


def colours(split):
    seed = 10 + list(COUNTS).index(split)
    return np.random.default_rng(seed).integers(0, 256, (COUNTS[split], 3, 32, 32), np.uint8)


def cifar_labels(split):
    return [(3 * i + len(split)) % 10 for i in range(len(colours(split)))]


@pytest.fixture
def batches(monkeypatch):
    """The files of a tiny CIFAR-10 by name, whose hashes torchvision takes for the published ones."""
    content = {"batches.meta": {"label_names": CIFAR, "num_vis": 3072}}
    for i in range(5):
        rows, labels = colours("train")[2 * i : 2 * i + 2], cifar_labels("train")[2 * i : 2 * i + 2]
        content[f"data_batch_{i + 1}"] = {"data": rows.reshape(2, -1), "labels": labels}
    content["test_batch"] = {"data": colours("test").reshape(3, -1), "labels": cifar_labels("test")}
    files = {name: pickle.dumps(value) for name, value in content.items()}
    md5 = {name: hashlib.md5(body).hexdigest() for name, body in files.items()}
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "train_list", [[n, md5[n]] for n in files if n.startswith("data")]
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return files


def write_batches(folder, batches):
    folder.mkdir(parents=True)
    for name, body in batches.items():
        (folder / name).write_bytes(body)
    return folder


def write_archive(folder, batches, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, body in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def refused(name, *words, **arguments):
    with pytest.raises(UserError) as caught:
        load_data(str(name), **{"resolution": 32, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("layout", ["root", "batches", "renamed", "archive", "named"])
def test_cifar10_as_stored(tmp_path, monkeypatch, batches, layout, split):
    name = tmp_path / "cifar"
    if layout == "archive":
        write_archive(name, batches, monkeypatch)
    elif layout == "named":
        write_batches(tmp_path / "cifar10" / "cifar-10-batches-py", batches)
        monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
        name = "cifar10"
    else:
        folder = "mine" if layout == "renamed" else "cifar-10-batches-py"
        inside = write_batches(name / folder, batches)
        name = name if layout == "root" else inside
    data = load_data(str(name), split=split, resolution=32)
    assert np.array_equal(data.images().numpy(), colours(split)) and data.images().is_contiguous()
    assert data.labels == cifar_labels(split) and data.classes == tuple(CIFAR)
    assert data.captions == [CIFAR[label] for label in cifar_labels(split)]
    assert data.rows == [{"category": caption} for caption in data.captions]
    if layout == "archive":
        assert sorted(p.name for p in name.iterdir()) == ["cifar-10-python.tar.gz"]


def test_another_file_of_cifar10_is_named_and_not_unpickled(tmp_path, monkeypatch, batches):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    folder = write_batches(tmp_path / "batches", batches)
    load_data(str(folder), resolution=32)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    refused(folder, str(folder), "data_batch_3 missing or not as published", "cifar-10-python.tar.gz")
    (folder / "test_batch").unlink()
    refused(folder, "data_batch_3, test_batch")
    path = write_archive(tmp_path / "archive", batches | {"test_batch": pickle.dumps(Trap())}, monkeypatch)
    refused(path.parent, "test_batch")
    path.write_bytes(path.read_bytes()[:-9])
    refused(path.parent, str(path), "MD5", "fetch it again")
    assert not (tmp_path / "sprung").exists()


def test_cifar10_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch, network, batches):
    address, broken = network
    path = write_archive(tmp_path / "site", batches, monkeypatch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", address + path.name)
    broken.add(f"/{path.name}")
    refused("cifar10", "cannot be fetched", "FEWSTEP_DATA")
    broken.clear()
    for split in COUNTS:
        data = load_data("cifar10", split=split, resolution=32)
        assert np.array_equal(data.images().numpy(), colours(split))
        path.unlink(missing_ok=True)
