"""What others may read of a configuration: names in place of this machine's folders."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..config.method import as_tree
from ..config.run import DataSettings, RunConfig
from ..config.search import SearchConfig
from ..models.lora_files import lora_place
from ..settings import TeacherSettings
from ..teachers import EMBEDDED

HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
HUB_FILE = r"\w[\w.-]*(/\w[\w.-]*)+"  # owner/name/file of a LoRA
TEXTS = ("validation_prompts",)  # never places, whatever stands in them
SETTINGS_HEAD = (
    "# The settings that made this folder. Folders of the machine they were used on are names here.\n"
)


def public(name: str) -> str:
    """What a card calls a model or data: an embedded name or hub id as it is, of what lies elsewhere the last part."""
    place = Path(name).expanduser()
    if name in EMBEDDED or (not place.exists() and re.fullmatch(HUB_ID, name)):
        return name
    return place.resolve().name


def published(part: Any) -> Any:
    """TeacherSettings or DataSettings as a card may name them."""
    key = "path" if isinstance(part, TeacherSettings) else "name"
    return replace(part, **{key: public(getattr(part, key))})


def teacher_line(teacher: TeacherSettings) -> str:
    """What a student was distilled from."""
    if teacher.lora is None:
        return teacher.path
    place, name = lora_place(teacher.lora, "teacher.lora")
    return f"{teacher.path} with {teacher.lora_scale:g} x {name if Path(place).is_dir() else teacher.lora}"


def data_line(data: DataSettings) -> str:
    """What a student was trained on."""
    if data.prompts is None:
        return f"{data.name}, split {data.split}"
    return f"the teacher's own latents of {Path(data.prompts).name}"


def public_settings(config: RunConfig | SearchConfig) -> str:
    """The resolved configuration as the YAML that goes into an exported folder."""
    tree = {key: value if key in TEXTS else _named(value) for key, value in as_tree(config).items()}
    tree["output_dir"] = Path(config.output_dir).name
    return SETTINGS_HEAD + yaml.safe_dump(tree, sort_keys=False)


def _named(value: Any) -> Any:
    """Nested values with the last part of each place in its place."""
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_named(part) for part in value]
    if not isinstance(value, str) or value in EMBEDDED:
        return value
    place = Path(value).expanduser()
    if "/" not in value and not place.exists():
        return value
    return value if not place.exists() and re.fullmatch(HUB_FILE, value) else place.name
