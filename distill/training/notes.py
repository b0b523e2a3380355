"""What an export says of its training beside its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Notes:
    """A JSON file in an exported folder."""

    file: str
    values: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / self.file).write_text(json.dumps(self.values, indent=2) + "\n")
