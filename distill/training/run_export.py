"""The folders that a run exports: a LoRA in two layouts, and a pipeline."""

import shutil
from pathlib import Path

from PIL import Image

from ...pipelines.export import KOHYA, Export, write_adapter, write_export, write_kohya
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..writers import write_folder
from .model_card import GRID, SETTINGS, Made, adapter_card, run_card
from .public_names import public_settings


def write_exports(run: Path, config: RunConfig, export: Export, made: Made, grid: Path | None) -> list[str]:
    """Writes lora/, kohya/ and pipeline/ below `run`, as far as there is something for them; returns their names.

    grid: the pictures that go beside the cards.
    """
    names = []
    if export.adapter is not None:
        names.append("lora")

        def fill_adapter(folder: Path) -> None:
            write_adapter(export, folder, adapter_card(config, export, made))
            put_beside(folder, config, grid)

        write_folder(run / "lora", fill_adapter)
        adapter = export.adapter
        if adapter.component == "unet":
            names.append(KOHYA)
            name = run.name or "lora"
            write_folder(run / KOHYA, lambda folder: write_kohya(adapter, folder, name))
    if export.model is not None:
        names.append("pipeline")

        def fill(folder: Path) -> None:
            write_export(export, folder, run_card(config, export, made))
            put_beside(folder, config, grid)

        write_folder(run / "pipeline", fill)
    return names


def put_beside(folder: Path, config: RunConfig | SearchConfig, grid: Path | Image.Image | None) -> None:
    """The pictures of a card and the settings, into its folder."""
    (folder / SETTINGS).write_text(public_settings(config))
    if isinstance(grid, Path):
        shutil.copy(grid, folder / GRID)
    elif grid is not None:
        grid.save(folder / GRID)
