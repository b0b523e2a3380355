"""Captions of folders: where they stand, those that are not there, and what a run on prompts says of it."""

import json
import logging

import numpy as np
import pytest
from fewstep.distill.data.prompts import read_prompts
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image

WORDS = ("NA", "null", "None", "nan", "N/A", "#N/A", "-nan", "true", "7", "1e5", " a, b ")


def pictures(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def load(folder, **options):
    return load_data(str(folder), resolution=8, **options)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_file_beside_each_picture(tmp_path):
    folder = pictures(tmp_path, ["b.png", "sub/a.JPG", "c.png", "d.png"])
    (folder / "b.txt").write_bytes("\ufeffa red sheet\r\n".encode())
    (folder / "sub" / "a.txt").write_text("eine rote Fläche\u2028matt", encoding="utf-8")
    (folder / "c.txt").write_text(" \n")
    (folder / "notes.txt").write_text("of no picture")
    data = load(folder)
    assert data.captions == ["a red sheet", "", "", "eine rote Fläche\u2028matt"] and data.uncaptioned == [
        1,
        2,
    ]
    assert load(folder, caption_column=None).captions == [""] * 4
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    assert f"{folder / 'd.txt'}: is not UTF-8" in refusal(lambda: load(folder))


def test_text_files_leave_class_folders_their_classes(tmp_path):
    folder = pictures(tmp_path, ["cats/1.png", "dogs/1.png", "dogs/2.png"])
    (folder / "cats" / "1.txt").write_text("a cat")
    data = load(folder)
    assert (data.captions, data.classes, data.labels) == (["a cat", "", ""], ("cats", "dogs"), [0, 1, 1])
    assert load(folder, caption_column="label").captions == ["cats", "dogs", "dogs"]


def test_csv_is_text_and_only_an_empty_cell_is_missing(tmp_path):
    names = [f"{i:02}.png" for i in range(len(WORDS) + 2)]
    cells = [*(f'"{word}"' for word in WORDS), "", '"two\nlines\u2028here"']
    lines = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    (pictures(tmp_path, names) / "metadata.csv").write_bytes(
        ("\ufefffile_name, text\r\n" + "\r\n".join(lines)).encode()
    )
    data = load(tmp_path)
    assert data.captions == [*WORDS, "", "two\nlines\u2028here"] and data.uncaptioned == [len(WORDS)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name;text\na.png;x", ["first line", '"file_name"', "commas"]),
        ("file_name,text\na.png,red, round", ["line 2 has 3 cells", "double quotes"]),
        ("file_name,text\na.png", ["line 2 has 1 cells"]),
        ('file_name,text\na.png,"red', ["line 2 is no CSV"]),
        ("file_name,text\nb.png,x", ["line 2 names b.png", "not there"]),
        ("file_name,text\n", ["names no pictures"]),
        ("file_name,text\n/etc/hosts,x", ["/etc/hosts", "below the file's own folder"]),
        ("file_name,text\n../a.png,x", ["../a.png", "below the file's own folder"]),
    ],
)
def test_bad_csv(tmp_path, text, words):
    (pictures(tmp_path, ["a.png"]) / "metadata.csv").write_text(text)
    message = refusal(lambda: load(tmp_path))
    assert str(tmp_path / "metadata.csv") in message
    assert [word for word in words if word not in message] == [], message


def test_json_lines_keep_their_separators_and_count_what_is_missing(tmp_path, caplog):
    folder = pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    rows = [{"file_name": "a.png", "text": "car\u2028roof\x85\x0c"}, {"file_name": "b.png", "text": None}]
    rows += [{"file_name": "c.png"}, {"file_name": "d.png", "text": "null"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(f"\ufeff{lines}".encode())
    with caplog.at_level(logging.WARNING):
        data = load(folder)
        load(folder)
    assert data.captions == ["car\u2028roof\x85\x0c", "", "", "null"]
    (line,) = [r.getMessage() for r in caplog.records if "caption" in r.getMessage()]
    assert line.startswith(f"{folder}: 2 of 4 pictures have no caption") and line.endswith(
        str(folder / "b.png")
    )
    data.need_captions()
    surrogate = json.dumps({"file_name": "a.png", "text": "\ud83d"})
    (folder / "metadata.jsonl").write_text(surrogate)
    assert "surrogate" in refusal(lambda: load(folder))


def test_null_captions_of_parquet_are_counted(tmp_path):
    import datasets

    columns = {"image": [np.zeros((8, 8, 3), np.uint8)] * 3, "text": ["x", None, "NA"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data.parquet")
    data = load(tmp_path)
    assert data.captions == ["x", "", "NA"] and data.uncaptioned == [1]

    import pyarrow
    import pyarrow.parquet

    folder = pictures(tmp_path / "folder", ["a.png", "b.png"])
    table = pyarrow.table({"file_name": ["b.png", "a.png"], "text": [None, "null"]})
    pyarrow.parquet.write_table(table, folder / "metadata.parquet")
    data = load(folder)
    assert (data.captions, data.called(0)) == (["", "null"], str(folder / "b.png"))


def test_two_kinds_of_metadata_are_refused(tmp_path):
    folder = pictures(tmp_path, ["a.png"])
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    (folder / "metadata.csv").write_text("file_name,text\na.png,y\n")
    assert "metadata.csv and metadata.jsonl: keep one" in refusal(lambda: load(folder))


def test_data_without_a_caption_are_refused_where_prompts_are_needed(tmp_path):
    plain = load(pictures(tmp_path / "plain", ["a.png", "b.png"]))
    message = refusal(plain.need_captions)
    for word in ("data.name", "metadata.jsonl", "NAME.txt", "data.caption_column", "null"):
        assert word in message
    assert "label" not in message
    classes = load(pictures(tmp_path / "classes", ["x/a.png", "y/b.png"]))
    assert "data.caption_column to label for" in refusal(classes.need_captions)
    load(tmp_path / "classes", caption_column="label").need_captions()
    blank = pictures(tmp_path / "blank", ["a.png"])
    (blank / "metadata.jsonl").write_text('{"file_name": "a.png", "text": " "}')
    refusal(load(blank).need_captions)


def test_prompts_of_a_windows_editor(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffred apple\r\n\r\n blue car\u2028with a\x0croof \r\nred apple".encode())
    (tmp_path / "._prompts.txt").write_bytes(b"\0\xff")
    expected = ["red apple", "blue car\u2028with a\x0croof", "red apple"]
    assert read_prompts(str(path)) == expected == read_prompts(str(tmp_path))
    path.write_bytes(b"caf\xe9")
    assert "is not UTF-8" in refusal(lambda: read_prompts(str(path)))
    path.write_bytes(b"\xef\xbb\xbf \n")
    assert "holds no prompts" in refusal(lambda: read_prompts(str(path)))
