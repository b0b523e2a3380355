"""Names, captions and titles that look like Markdown, HTML, templates or JSON stay the text that they are."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fewstep.distill.reports.csv_latex import csv_text, latex
from fewstep.distill.reports.markup import filled, markdown_text, script_json
from fewstep.distill.reports.page import page
from fewstep.distill.reports.table import by_steps, markdown, markdown_table
from PIL import Image

from ..metrics.test_protocol import score

HOSTILE = [
    "{{data}}",
    "{{title}} {{pictures}}",
    r"\g<0> \1 \\",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)",
    "a|b`c`|d",
    "**bold** _em_ [link](http://x) ![i](x) ~~no~~ $x$",
    "two\nlines\r\n# head\n| a | b |",
    "&lt;b&gt; &amp;",
    "line\u2028separator\u0085",
    "\u202eright to left",
]


class Seen(HTMLParser):
    """The elements of a page with their attributes, and its text apart from scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.text, self.scripts, self.inside = "", [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(k for k, _ in attrs)))
        self.values += [v for _, v in attrs if v]
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.text += data


def record(name: str, folder: Path) -> dict[str, Any]:
    """A comparison where every text that users, data sets and reports choose is `name`."""
    Image.new("RGB", (8, 4)).save(folder / "a.png")
    scores = [score(metric=m, reference=name, conditioning=name) for m in ("KID", "FD")]
    row = {
        "model": name, "method": name, "export": "stock", "steps": 1, "nfe": 1, "seeds": 1,
        "seconds_per_image": 0.5, "peak_memory": {"bytes": 5}, "arguments": {}, "bytes": 7,
        "scores": [s.to_json() for s in scores], "training": {"seconds": 3.0, "steps": 2},
        "measured": "before", "config": {"method": {"name": "lcd"}, "data": {"name": name}},
        "device": name, "batch_size": 4, "versions": {name: name}, "commit": name, "verified": name,
    }  # fmt: skip
    published = {
        "method": name, "steps": 1, "metric": "FID", "value": 3.0, "benchmark": name, "source": name,
        "here": [name],
    }  # fmt: skip
    strips = {
        "made_from": name,
        "captions": [{"text": name, "seen": False}],
        "pictures": [{"model": name, "steps": 1, "file": "a.png"}],
    }
    other = {**row, "steps": 2, "batch_size": 8}
    return {"title": name, "rows": [row, other], "strips": [strips], "published": [published]}


@pytest.mark.parametrize("name", HOSTILE)
def test_page_of_a_hostile_name(name: str, tmp_path: Path) -> None:
    plain, seen = (Seen(page(record(n, tmp_path), tmp_path)) for n in ("plain", name))
    assert seen.tags == plain.tags  # it adds no element and no attribute
    assert seen.text.count(name) >= 8 and f"{name}, 1 step" in seen.values
    assert len(seen.scripts) == 2 and seen.scripts[1] == plain.scripts[1]
    assert [m["name"] for m in json.loads(seen.scripts[0])["models"]] == [name]
    assert not re.search(r"[<>&\u2028\u2029]", seen.scripts[0])


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_of_a_hostile_name(name: str, tmp_path: Path) -> None:
    """A table has as many lines and unescaped bars as with a plain name, and shows the name."""
    for make in (by_steps, markdown, markdown_table):
        plain, text = (make(record(n, tmp_path)["rows"]) for n in ("plain", name))
        assert [bars(line) for line in text.split("\n")] == [bars(line) for line in plain.split("\n")]
        assert "<" not in text and not re.search(r"(?<!\\)[`*\[\]~]", re.sub(r"\\\\", "", text))
        assert " ".join(name.split()) in shown(text)


@pytest.mark.parametrize("name", HOSTILE)
def test_csv_of_a_hostile_name(name: str, tmp_path: Path) -> None:
    """Any reader of CSV gets the name back as it was, in as many lines and columns as a plain one has."""
    plain, lines = (
        list(csv.reader(io.StringIO(csv_text(record(n, tmp_path)["rows"]), newline="")))
        for n in ("plain", name)
    )
    assert [len(line) for line in lines] == [len(line) for line in plain]
    assert [line[0] for line in lines] == ["model", name, name]


@pytest.mark.parametrize("name", [*HOSTILE, r"50% & \cost{$x_1^2$} #1 [2] ~"])
def test_latex_of_a_hostile_name(name: str, tmp_path: Path) -> None:
    """It adds no command, no cell, no line, no comment and no group that stays open."""
    plain, text = (latex(n, record(n, tmp_path)["rows"]) for n in ("plain", name))
    assert text.count("\n") == plain.count("\n")
    bare = re.sub(
        r"\\text(backslash|asciitilde|asciicircum|less|greater|bar)\{\}|\\[&%$#_{}]|\{[\[\]]\}", "", text
    )
    for special in "&%$#_{}\\~^":
        assert bare.count(special) == plain.count(special), special
    assert not re.search(r"\\\\\s*\[", text)


def bars(line: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))


def shown(text: str) -> str:
    """What a reader of Markdown shows of escaped text (CommonMark 0.31, sections 2.4 and 2.5)."""
    text = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def test_what_needs_no_escape_stays_readable() -> None:
    for text in ("lcd_lora", "teacher (emoji-sd)", "KID-efflite0-128", "0.0100 ± 0.0010", "#2, w=1.5!"):
        assert markdown_text(text) == text
    assert markdown_text("_a_ b_c __d__") == r"\_a\_ b_c \_\_d\_\_"


def test_a_template_is_filled_in_one_pass() -> None:
    assert filled("{{a}} {{b}} {{a}}", {"a": "{{b}}", "b": r"\1{{a}}"}) == r"{{b}} \1{{a}} {{b}}"
    for fields in ({"a": "1"}, {"a": "1", "b": "2", "c": "3"}):
        with pytest.raises(AssertionError):
            filled("{{a}} {{b}}", fields)


def test_json_of_a_script_is_the_same_json() -> None:
    value = {"</script>": ["<!--", "&amp;", "\u2028\u2029"], "x": 1.5}
    assert json.loads(script_json(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))
