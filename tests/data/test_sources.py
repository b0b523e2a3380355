"""Folders, shards and tables on disk, as a user would have them, and what they may get wrong."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image

COLOURS = {"red": (200, 10, 10), "green": (10, 180, 10), "blue": (10, 10, 220)}


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def write_images(folder, names=COLOURS, size=(20, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, COLOURS[name]).save(folder / f"{name}.png")
    return folder


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def captioned(folder, names=COLOURS):
    write_images(folder, names)
    write_metadata(folder, [{"file_name": f"{n}.png", "text": f"a {n} sheet"} for n in names])
    return folder


def write_shard(path, rows, suffix="png"):
    with tarfile.open(path, "w") as tar:
        for key, (colour, extra) in rows.items():
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
            for ending, content in {suffix: buffer.getvalue(), **extra}.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def savable():
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}


def colour_of(image):
    return tuple(image[:, 4, 4].tolist())


def refused(name, *words, **arguments):
    with pytest.raises(UserError) as caught:
        data = load_data(str(name), **{"resolution": 8, **arguments})
        data.images()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


def test_image_folder_with_captions(tmp_path):
    data = load_data(str(captioned(tmp_path / "pics [1]")), resolution=8)
    assert data.captions == ["a red sheet", "a green sheet", "a blue sheet"]
    assert data.images().shape == (3, 3, 8, 8) and data.images().dtype == torch.uint8
    assert [colour_of(i) for i in data.images()] == list(COLOURS.values())
    assert [colour_of(i) for i in data.images([2, 0])] == [COLOURS["blue"], COLOURS["red"]]


def test_another_caption_column_and_none(tmp_path):
    folder = write_images(tmp_path)
    write_metadata(folder, [{"file_name": f"{n}.png", "title": n, "category": n[0]} for n in COLOURS])
    data = load_data(str(folder), resolution=8, caption_column="title")
    assert data.captions == list(COLOURS) and data.rows == [{"category": n[0]} for n in COLOURS]
    assert load_data(str(folder), resolution=8, caption_column=None).captions == [""] * 3
    refused(folder, "metadata.jsonl", "'text'", "title, category")


def test_plain_images_have_empty_captions_and_class_folders_categories(tmp_path):
    assert load_data(str(write_images(tmp_path / "plain")), resolution=8).captions == [""] * 3
    for name in COLOURS:
        write_images(tmp_path / "classes" / name, [name])
    data = load_data(str(tmp_path / "classes"), resolution=8)
    assert data.captions == [""] * 3
    assert [COLOURS[r["category"]] for r in data.rows] == [colour_of(i) for i in data.images()]
    named = load_data(str(tmp_path / "classes"), resolution=8, caption_column="label")
    assert named.captions == [r["category"] for r in data.rows]
    refused(tmp_path / "classes", "'title'", "label", caption_column="title")


def test_changed_folder_is_seen(tmp_path):
    folder = captioned(tmp_path / "a", ["red", "green"])
    before = load_data(str(folder), resolution=8)
    captioned(folder)
    after = load_data(str(folder), resolution=8)
    assert (len(before), len(after)) == (2, 3) and before.fingerprint != after.fingerprint


def test_splits_are_subfolders(tmp_path):
    captioned(tmp_path / "train", ["red", "green"])
    captioned(tmp_path / "holdout", ["blue"])
    assert load_data(str(tmp_path), resolution=8).captions == ["a red sheet", "a green sheet"]
    assert load_data(str(tmp_path), split="holdout", resolution=8).captions == ["a blue sheet"]
    refused(tmp_path, "'score'", "train, holdout", str(tmp_path / "score"), split="score")
    shutil.move(tmp_path / "train" / "metadata.jsonl", tmp_path)
    refused(tmp_path, str(tmp_path / "train"), "metadata.jsonl")


def test_no_holdout_says_how_to_make_one(tmp_path):
    captioned(tmp_path)
    refused(tmp_path, "'holdout'", str(tmp_path / "holdout"), str(tmp_path / "train"), split="holdout")


def test_shards_with_txt_and_json_captions(tmp_path):
    write_shard(
        tmp_path / "s-00.tar", {"0": ("red", {"txt": b"a red sheet"}), "1": ("green", {"txt": b"green"})}
    )
    write_shard(tmp_path / "s-01.tar", {"2": ("blue", {"txt": b"blue \xc3\xa9"})})
    for name in (tmp_path, tmp_path / "s-{00..01}.tar", tmp_path / "s-*.tar", tmp_path / "s-{00,01}.tar"):
        data = load_data(str(name), resolution=8)
        assert data.captions == ["a red sheet", "green", "blue é"]
        assert [colour_of(i) for i in data.images()] == list(COLOURS.values())
    assert load_data(str(tmp_path / "s-01.tar"), resolution=8).captions == ["blue é"]
    refused(tmp_path / "s-{00..02}.tar", "s-02.tar")
    refused(tmp_path / "s-*.tar", "'holdout'", split="holdout")
    refused(tmp_path, "'title'", "txt", caption_column="title")

    described = {"0": ("red", {"json": json.dumps({"title": "r", "width": 8}).encode()})}
    write_shard(tmp_path / "json.tar", described, "jpg")
    data = load_data(str(tmp_path / "json.tar"), resolution=8, caption_column="title")
    assert data.captions == ["r"] and abs(colour_of(data.images()[0])[0] - 200) < 4
    refused(tmp_path / "json.tar", "'text'", "title, width")


def test_broken_shards(tmp_path):
    write_shard(tmp_path / "a.tar", {"0": ("red", {"txt": b"x"}), "1": ("red", {"txt": b"x"})})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    refused(tmp_path / "a.tar", "a.tar")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "notes.txt", "no .tar shard")


def test_a_shard_with_a_broken_image_is_named(tmp_path):
    write_shard(tmp_path / "a.tar", {"0": ("red", {"txt": b"x"}), "1": ("red", {"txt": b"x"})})
    whole = (tmp_path / "a.tar").read_bytes()
    at = whole.rindex(b"\x89PNG")
    (tmp_path / "a.tar").write_bytes(whole[:at] + b"\0" * 60 + whole[at + 60 :])
    refused(tmp_path, "a.tar", "1.png")


def test_parquet_with_other_columns(tmp_path):
    pictures = [np.full((8, 8, 3), c, np.uint8) for c in COLOURS.values()]
    features = {
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=["warm", "cold"]),
        "words": datasets.List(datasets.Value("string")),
    }
    table = datasets.Dataset.from_dict(
        {"picture": pictures, "label": [0, 1, 1], "words": [["a"]] * 3}, features=datasets.Features(features)
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = load_data(str(tmp_path), resolution=8, image_column="picture", caption_column="label")
    assert data.captions == ["warm", "cold", "cold"] == [r["category"] for r in data.rows]
    assert [colour_of(i) for i in data.images()] == list(COLOURS.values())
    refused(tmp_path, "'image'", "picture")
    refused(tmp_path, "'text'", "label, words", image_column="picture")
    refused(tmp_path, "row 0", "(list)", image_column="picture", caption_column="words")


def test_missing_and_empty_folders(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder")
    refused("./nowhere", "./nowhere", "no such folder")
    refused(tmp_path, str(tmp_path), "no images")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "no images")


@pytest.mark.parametrize("keep", [0, 20, 60, 200])
def test_truncated_image_is_named(tmp_path, keep):
    folder = captioned(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "green.png")
    whole = (folder / "green.png").read_bytes()
    (folder / "green.png").write_bytes(whole[:keep])
    refused(folder, str(folder / "green.png"), "cannot be read")
    assert load_data(str(folder), resolution=8).images([0, 2]).shape == (2, 3, 8, 8)


def test_text_in_an_image_file_is_named(tmp_path):
    folder = captioned(tmp_path)
    (folder / "blue.png").write_text("<html>404</html>")
    refused(folder, str(folder / "blue.png"), "no image")


def test_image_that_vanished_is_named(tmp_path):
    data = load_data(str(captioned(tmp_path)), resolution=8)
    (tmp_path / "red.png").unlink()
    with pytest.raises(UserError, match=r"red\.png"):
        data.images([0])
    with pytest.raises(UserError, match=r"red\.png"):
        _ = data.fingerprint


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"file_name": "gone.png", "text": "x"}', ["line 1", "gone.png"]),
        ('{"file_name": "red.png", "text": "x"}\n{"file_name": "red', ["line 2", "not JSON"]),
        ('{"file": "red.png", "text": "x"}', ["line 1", "file_name"]),
        ('["red.png"]', ["line 1", "file_name"]),
        ('{"file_name": "red.png", "text": 7}', ["7 (int)", "row 0"]),
        ("", ["metadata.jsonl", "names no pictures"]),
    ],
)
def test_bad_metadata(tmp_path, lines, words):
    write_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(lines)
    refused(tmp_path, str(tmp_path), *words)


def test_metadata_may_leave_out_captions_and_lines(tmp_path):
    write_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "blue.png", "text": "b"}\n\n{"file_name": "red.png"}\n'
    )
    data = load_data(str(tmp_path), resolution=8)
    assert data.captions == ["b", ""] and colour_of(data.images([1])[0]) == COLOURS["red"]


def test_files_beside_pictures_are_no_pictures(tmp_path):
    folder = captioned(tmp_path / "captioned")
    plain = write_images(tmp_path / "plain")
    for place in (folder, plain):
        for name in (
            "red.png.bak",
            "red.png.txt",
            "Thumbs.db",
            "red.json",
            ".red.png",
            "red.png~",
            "notes.md",
        ):
            (place / name).write_bytes(b"no picture")
        (place / ".thumbnails").mkdir()
        (place / ".thumbnails" / "a.png").write_bytes(b"no picture")
        assert len(load_data(str(place), resolution=8).images()) == 3


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "sub/a.jxl", "a.CR2", "a.svg"])
def test_pictures_of_formats_that_are_not_read_are_refused(tmp_path, name):
    folder = write_images(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"of a camera")
    refused(folder, "1 of 4 pictures", os.path.splitext(name)[1].lower(), str(folder / name), ".png")
    rows = [{"file_name": f"{n}.png", "text": n} for n in COLOURS]
    write_metadata(folder, rows)
    assert len(load_data(str(folder), resolution=8)) == 3  # metadata that does not list it leaves it out
    write_metadata(folder, [*rows, {"file_name": name, "text": "x"}])
    refused(folder, "metadata.jsonl: 1 of 4", str(folder / name))


def test_every_ending_that_is_read_is_found(tmp_path):
    kinds = {
        "png": "PNG",
        "jpg": "JPEG",
        "JPEG": "JPEG",
        "jfif": "JPEG",
        "webp": "WEBP",
        "bmp": "BMP",
        "gif": "GIF",
    }
    kinds |= {"tif": "TIFF", "tga": "TGA", "ppm": "PPM"} | ({"avif": "AVIF"} if ".avif" in savable() else {})
    for ending, kind in kinds.items():
        Image.new("RGB", (8, 8), COLOURS["green"]).save(tmp_path / f"{ending}.{ending}", kind)
    data = load_data(str(tmp_path), resolution=8)
    assert len(data) == len(kinds)
    assert all(abs(image[1].float().mean() - 180) < 8 for image in data.images())


def test_what_a_folder_leaves_out_is_said(tmp_path, caplog):
    folder = captioned(tmp_path, ["red"])
    write_images(folder, ["green", "blue"])
    assert len(load_data(str(folder), resolution=8)) == 1
    (folder / "metadata.jsonl").unlink()
    (folder / "old.zip").write_bytes(b"")
    assert len(load_data(str(folder), resolution=8)) == 3
    captioned(folder / "train", ["red"])
    assert len(load_data(str(folder), resolution=8)) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(f"{folder}: ")[2].partition(",")[0].partition(";")[0] for line in lines] == [
        "2 of 3 pictures stand in no metadata",
        "its pictures are read",
        f"only {folder / 'train'} is the split 'train'",
    ]
    assert all(word in lines[1] for word in ("1 files (.zip)", "old.zip"))


def test_linked_folders_are_read_and_circles_are_left(tmp_path):
    write_images(tmp_path / "elsewhere", ["red"])
    folder = write_images(tmp_path / "pictures", ["green"])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    assert len(load_data(str(folder), resolution=8)) == 2


def test_hub_id_without_network_fails_at_once_in_one_line(tmp_path):
    code = (
        "import sys, time; time.sleep = lambda seconds: print('waits', seconds, file=sys.stderr)\n"
        "from fewstep.distill.data.sources import load_data; from fewstep.distill.errors import UserError\n"
        "for name in ('someone/pictures', 'emoji_noto'):\n"
        "    try: load_data(name, resolution=8)\n"
        "    except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[0].startswith("someone/pictures: cannot be reached") and "give a local folder" in lines[0]
    assert "did you mean emoji-noto?" in lines[1]
    assert done.stderr == ""  # no attempt is repeated after a pause
