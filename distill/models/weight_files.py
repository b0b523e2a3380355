"""Which weight files a pipeline's folder holds: diffusers names a variant between a file's name and its ending."""

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError

NAMED = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def variants_in(part: Path) -> set[str | None]:
    """Variants of a component's weight files; None stands for files without one."""
    found = (NAMED.fullmatch(file.name) for file in part.glob("*"))
    return {match["variant"] for match in found if match}


def component_sizes(files: Mapping[str, int], variant: str | None) -> dict[str, int]:
    """Bytes of the weights that diffusers takes of each component, out of the sizes of a repository's files: those of
    the variant before those without, safetensors before bin."""
    sizes: dict[str, dict[tuple[bool, bool], int]] = {}
    for name, size in files.items():
        part, _, file = name.rpartition("/")
        match = NAMED.fullmatch(file)
        if match and part and match["variant"] in (None, variant):
            rank = (match["variant"] != variant, not file.endswith(".safetensors"))
            sizes.setdefault(part, {}).setdefault(rank, 0)
            sizes[part][rank] += size
    return {part: ranked[min(ranked)] for part, ranked in sizes.items()}


def only_variant(folder: Path) -> str | None:
    """The one variant that a component has no files beside; None where every component has some, or they differ."""
    parts = (variants_in(part) for part in folder.iterdir() if part.is_dir())
    lacking = [found for found in parts if found and None not in found]
    common = set.intersection(*lacking) if lacking else set()
    return next(iter(common)) if len(common) == 1 else None


def refuse_variant(folder: Path, chosen: str | None, key: str = "teacher.path") -> None:
    """UserError where a folder must be opened by the name of its variant, and is not."""
    only = only_variant(folder) if chosen is None and folder.is_dir() else None
    if only is not None:
        option = key.replace("path", "variant")
        raise UserError(f"{key}: {folder} holds weights of the variant {only} alone; add --{option} {only}")
