"""Every file of text, JSON, YAML or tensors that is read: what is wrong with one becomes a line that names it.

Files of a run folder, of a user and of other programs are damaged in the same few ways: cut short, not UTF-8, with the
byte-order mark of Windows editors, nested without an end, of another shape than expected. A reader of one kind of file
states the shape (any type that pydantic knows; a TypedDict of typing_extensions where keys matter) and what to do about
a damaged one; the rest is here.
"""

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import UserError

SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # of a YAML file, whose aliases can stand for more than memory holds


class Unreadable(UserError):
    """A file that is there and cannot be used."""


def read_text(path: Path | str, *, remedy: str = "save it again as UTF-8 text") -> str:
    """The text of a UTF-8 file, without its byte-order mark. Raises FileNotFoundError, else Unreadable."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a file stands where a folder of the path should
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path}: is not UTF-8 text (byte {error.start}): {remedy}") from error
    except (OSError, ValueError) as error:  # a folder, no right to read, a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(f"{path}: cannot be read ({reason}): {remedy}") from error


def parse_json(text: str | bytes, name: Path | str, kind: Any = Any, *, remedy: str = "mend it") -> Any:
    """A JSON value of the type `kind` (pydantic checks it, extra keys are allowed). Raises Unreadable."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text)
        if SURROGATE.search(text):  # half a character, which nothing can write
            json.dumps(value, ensure_ascii=False).encode()
        return fitting(value, name, kind, remedy=remedy)
    except RecursionError as error:
        raise Unreadable(f"{name}: is nested too deeply: {remedy}") from error
    except ValueError as error:
        where = f"line {error.lineno}, {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Unreadable(f"{name}: is not JSON ({where}): {remedy}") from error


def read_json(path: Path | str, kind: Any = Any, *, remedy: str = "mend it") -> Any:
    """The value of a JSON file, as `parse_json`. Raises FileNotFoundError, else Unreadable."""
    return parse_json(read_text(path, remedy=remedy), path, kind, remedy=remedy)


def read_json_lines(path: Path | str, kind: Any = dict[str, Any], *, remedy: str = "mend it") -> list[Any]:
    """One value of type `kind` for each line that is not blank; only a newline ends a line.

    Raises FileNotFoundError, else Unreadable with the number of the line.
    """
    lines = read_text(path, remedy=remedy).split("\n")
    return [
        parse_json(line, f"{path}: line {number}", kind, remedy=remedy)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def parse_yaml(text: str, name: Path | str, *, remedy: str = "mend it", written: bool = False) -> Any:
    """A YAML value. Raises Unreadable for what is no YAML, a key given twice, and what has no end.

    written: numbers keep the text that they were written as (`Written`), and dates stay text.
    """
    try:
        tree = yaml.load(text, Loader=_WrittenLoader if written else _Loader)
        _check_size(tree)
        return tree
    except RecursionError as error:
        raise Unreadable(f"{name}: is nested too deeply: {remedy}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(
            f"{name}: is not readable YAML ({' '.join(str(error).split())[:160]}): {remedy}"
        ) from error


def read_yaml_file(path: Path | str, *, remedy: str = "mend it", written: bool = False) -> Any:
    """The value of a YAML file, as `parse_yaml`. Raises FileNotFoundError, else Unreadable."""
    return parse_yaml(read_text(path, remedy=remedy), path, remedy=remedy, written=written)


def fitting(value: Any, name: Path | str, kind: Any, *, remedy: str = "mend it") -> Any:
    """`value` as the type `kind`, or Unreadable that names the first place that does not fit."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its value"
        raise Unreadable(f"{name}: {place}: {first['msg'].lower()}: {remedy}") from error


def check_finite(value: Any, name: Path | str, *, remedy: str = "mend it") -> None:
    """Unreadable where a value of JSON holds NaN or an infinity, which Python reads and no other program does."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{name}: holds a number that is not finite: {remedy}") from error


def read_tensors(path: Path | str, *, remedy: str = "make or fetch it again") -> dict[str, Any]:
    """The tensors of a safetensors file by name, on the CPU. Raises FileNotFoundError, else Unreadable."""
    from safetensors.torch import load_file

    with _of_tensors(path, "safetensors file", remedy):
        return load_file(path)


def open_tensors(path: Path | str, *, remedy: str = "make or fetch it again") -> Any:
    """An open safetensors file, of which tensors are read one at a time. Errors as in `read_tensors`."""
    from safetensors import safe_open

    with _of_tensors(path, "safetensors file", remedy):
        return safe_open(path, framework="pt")


def read_objects(path: Path | str, kind: Any = Any, *, remedy: str = "make or fetch it again") -> Any:
    """What torch.save wrote, without running code of the file, as the type `kind`, on the CPU. Errors alike."""
    import torch

    with _of_tensors(path, "file of torch.save", remedy):
        value = torch.load(path, map_location="cpu", weights_only=True)
    return fitting(value, path, kind, remedy=remedy)


@contextmanager
def _of_tensors(path: Path | str, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, pickle, zipfile and torch have many classes for a damaged file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise Unreadable(f"{path}: is not a readable {what} ({reason}): {remedy}") from error


@lru_cache(maxsize=128)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class _Loader(yaml.SafeLoader):
    """YAML where a key stands once in its mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


class Written:
    """A number of a YAML file; text: as it was written, 007 or 1_000."""

    text: str


class WrittenInt(Written, int):
    pass


class WrittenFloat(Written, float):
    pass


class _WrittenLoader(_Loader):
    pass


def _written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    integer = node.tag == "tag:yaml.org,2002:int"
    value: Any = (
        WrittenInt(loader.construct_yaml_int(node))
        if integer
        else WrittenFloat(loader.construct_yaml_float(node))
    )  # type: ignore[no-untyped-call]
    value.text = node.value
    return value


for _tag in ("int", "float"):
    _WrittenLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _written)
_WrittenLoader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


def _check_size(tree: Any) -> None:
    """ValueError for a tree that is deeper than MAX_DEPTH, itself included, or has more than MAX_VALUES values."""
    open_nodes, count = [(tree, 0)], 0
    while open_nodes:
        node, depth = open_nodes.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply, or in itself")
        if count > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES} values")
        if isinstance(node, dict):
            open_nodes += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, str):
            node.encode()
        elif isinstance(node, list | tuple | set):
            open_nodes += [(value, depth + 1) for value in node]
