"""Damaged text, JSON and YAML files: each is one line that names the file and the place."""

import pytest
import torch
from fewstep.distill.readers import (
    Unreadable,
    open_tensors,
    parse_json,
    parse_yaml,
    read_json,
    read_json_lines,
    read_objects,
    read_tensors,
    read_text,
    read_yaml_file,
)
from safetensors.torch import save_file
from typing_extensions import TypedDict


class Shape(TypedDict):
    step: int
    folders: list[str]


def test_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffred\r\n".encode())
    assert read_text(path) == "red\n"


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n\n{"text": "four"}\n', encoding="utf-8")
    assert [row["text"] for row in read_json_lines(path)] == ["one\u2028two\x85three", "four"]


def test_missing_stays_missing(tmp_path):
    for read in (
        read_text, read_json, read_json_lines, read_yaml_file, read_tensors, open_tensors, read_objects,
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"step": 1', "line 1, Expecting ',' delimiter"),
        (b"\xff\xfe{}", "is not UTF-8 text (byte 0)"),
        (b"", "line 1, Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "its value: input should be a valid dictionary"),
        (b'{"step": "x", "folders": []}', "step: input should be a valid integer"),
        (b'{"step": 1}', "folders: field required"),
        (b'{"step": 1, "folders": [2]}', "folders.0: input should be a valid string"),
    ],
)
def test_damaged_json(tmp_path, content, line):
    path = tmp_path / "exported.json"
    path.write_bytes(content)
    with pytest.raises(Unreadable) as error:
        read_json(path, Shape, remedy="delete it")
    assert line in str(error.value)
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(": delete it")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(Unreadable, match="cannot be read"):
        read_json(tmp_path)


def test_line_of_damaged_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(Unreadable, match=r"log\.jsonl: line 2: is not JSON"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("a: {b: 1, b: 2}\n", "the key 'b' is given twice"),
        ("a: &a [*a]\n", "nested too deeply, or in itself"),
        ("a: &a {b: *a}\n", "nested too deeply, or in itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: [1, 2", "is not readable YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not readable YAML"),
        ("a: 2020-13-45\n", "is not readable YAML"),
    ],
)
def test_damaged_yaml(text, line):
    with pytest.raises(Unreadable) as error:
        parse_yaml(text, "mine.yaml")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_yaml_bomb_is_refused():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(Unreadable, match="stands for more than"):
        parse_yaml("\n".join(rows), "bomb.yaml")


def test_anchors_and_merged_keys_are_yaml():
    tree = parse_yaml("base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n", "mine.yaml")
    assert tree["mine"] == {"a": 1, "b": 3}


def test_extra_keys_are_allowed():
    assert parse_json('{"step": 1, "folders": [], "more": 2}', "x", Shape)["step"] == 1


@pytest.mark.parametrize("size", [0, 9, 60, -1])
def test_tensors_cut_short(tmp_path, size):
    tensors, objects = tmp_path / "a.safetensors", tmp_path / "a.pt"
    save_file({"a": torch.arange(6.0)}, tensors)
    torch.save({"a": torch.arange(6.0)}, objects)
    assert torch.equal(read_tensors(tensors)["a"], open_tensors(tensors).get_tensor("a"))
    assert torch.equal(read_objects(objects)["a"], torch.arange(6.0))
    for path, readers in ((tensors, (read_tensors, open_tensors)), (objects, (read_objects,))):
        path.write_bytes(path.read_bytes()[:size])
        for read in readers:
            with pytest.raises(Unreadable) as error:
                read(path, remedy="train again")
            assert str(error.value).startswith(f"{path}: is not a readable ")
            assert str(error.value).endswith(": train again") and "\n" not in str(error.value)


def test_objects_of_another_shape_or_with_code(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"step": "x", "folders": []}, path)
    with pytest.raises(Unreadable, match=r"a\.pt: step: input should be a valid integer"):
        read_objects(path, Shape)
    torch.save({"step": test_missing_stays_missing}, path)
    with pytest.raises(Unreadable, match=r"a\.pt: is not a readable file of torch\.save"):
        read_objects(path)
    for read in (read_tensors, open_tensors, read_objects):
        with pytest.raises(Unreadable):
            read(tmp_path)
