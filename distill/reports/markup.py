"""Text that is not ours put into Markdown and HTML: names, captions and titles stay text there."""

import json
import re
from collections.abc import Mapping
from typing import Any

FIELD = re.compile(r"\{\{(\w+)\}\}")
# What starts Markdown or HTML anywhere in a line; _ does so at the edge of a word alone.
SPECIAL = re.compile(r"([\\`*\[\]|~$])|((?<![^\W_])_|_(?![^\W_]))")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown_text(text: str) -> str:
    """Text as one line of Markdown that shows it, in a cell of a table too."""
    line = "".join(ENTITIES.get(c, c) for c in " ".join(text.split()))
    return SPECIAL.sub(r"\\\g<0>", line)


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template with each {{name}} replaced in one pass, so that no value is searched for names; all must be used."""
    assert {*FIELD.findall(template)} == fields.keys(), fields.keys()
    return FIELD.sub(lambda match: fields[match[1]], template)


def script_json(value: Any) -> str:
    """JSON that can stand in a <script> element: it ends no element and opens no comment."""
    text = json.dumps(value, allow_nan=False)  # ASCII: U+2028 is escaped too
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
