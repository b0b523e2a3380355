"""The licence of a teacher, as its model card states it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download

from ..models.teacher import locate
from ..settings import TeacherSettings

KEYS = ("license", "license_name", "license_link")


def licence_of(teacher: TeacherSettings) -> dict[str, str]:
    """The licence's entries of the card's front matter, {} where there is none or it cannot be read."""
    place = locate(teacher.path)
    try:
        found = Path(place) / "README.md"
        if not Path(place).is_dir():
            found = Path(hf_hub_download(place, "README.md", revision=teacher.revision))
        stated: dict[str, Any] = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network, or no entries in it
        return {}
    return {k: str(stated[k]) for k in KEYS if stated.get(k)}


def base_model(teacher: TeacherSettings) -> dict[str, str]:
    """The hub id that a student's card names as its base; a folder on this machine is none."""
    place = locate(teacher.path)
    return {} if Path(place).is_dir() else {"base_model": place}
