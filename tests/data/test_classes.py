"""Classes of data sets in label order, and the label of every row."""

import datasets
import numpy as np
import pytest
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_emoji_have_their_eight_categories_as_classes():
    data = load_data("emoji", split="score", resolution=32)
    assert len(data.classes) == 8 and list(data.classes) == sorted(data.classes)
    assert [data.classes[label] for label in data.labels] == [row["category"] for row in data.rows]
    assert data.classes == load_data("emoji-noto", split="train", resolution=32).classes


def test_tables_and_class_folders_have_classes_in_the_order_of_the_column(tmp_path):
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["warm", "cold", "mild"]),
        "category": datasets.Value("string"),
    }
    columns = {"image": [np.zeros((8, 8, 3), np.uint8)] * 3, "label": [2, 0, 1], "category": ["x", "y", "z"]}
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(tmp_path / "table" / "data.parquet")
    data = load_data(str(tmp_path / "table"), resolution=8, caption_column="label")
    assert (data.classes, data.labels) == (("warm", "cold", "mild"), [2, 0, 1])
    assert data.captions == ["mild", "warm", "cold"] == [row["category"] for row in data.rows]

    for name in ("b", "a"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "folders" / name / "0.png")
    data = load_data(str(tmp_path / "folders"), resolution=8)
    assert data.classes == ("a", "b") and data.labels == [0, 1]


def test_data_without_classes_says_so(tmp_path):
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain" / "a.png")
    data = load_data(str(tmp_path / "plain"), resolution=8)
    assert data.classes == ()
    with pytest.raises(UserError, match=r"plain: has no class labels: .*ClassLabel"):
        _ = data.labels
    emoji = load_data("emoji-noto", split="score", resolution=32)
    del emoji.rows[7]["category"]
    with pytest.raises(UserError, match=r"row 7 of emoji-noto has no class label"):
        _ = emoji.labels


def test_a_stray_picture_is_named_and_hides_no_classes(tmp_path):
    for place in ("a/0.png", "a/1.png", "b/0.png", "cover.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    data = load_data(str(tmp_path), resolution=8)
    assert data.classes == ("a", "b")
    with pytest.raises(UserError, match=r"cover\.png has no class label, nor have 0 other rows"):
        _ = data.labels
    (tmp_path / "cover.png").unlink()
    assert load_data(str(tmp_path), resolution=8).labels == [0, 0, 1]


def test_folders_of_pictures_at_many_depths_are_no_classes(tmp_path):
    for place in ("0.png", "1.png", "a/0.png", "b/0.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    assert load_data(str(tmp_path), resolution=8).classes == ()
