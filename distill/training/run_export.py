"""The folders that a run exports: a LoRA in two layouts, and a pipeline."""

from pathlib import Path

from ...pipelines.export import KOHYA, Export, write_adapter, write_export, write_kohya
from ..config.run import RunConfig
from ..writers import write_folder
from .model_card import adapter_card, run_card


def write_exports(run: Path, config: RunConfig, export: Export, step: int) -> list[str]:
    """Writes lora/, kohya/ and pipeline/ below `run`, as far as there is something for them; returns their names."""
    names = []
    if export.adapter is not None:
        names.append("lora")
        card = adapter_card(config, export, step)
        write_folder(run / "lora", lambda folder: write_adapter(export, folder, card))
        adapter = export.adapter
        if adapter.component == "unet":
            names.append(KOHYA)
            name = run.name or "lora"
            write_folder(run / KOHYA, lambda folder: write_kohya(adapter, folder, name))
    if export.model is not None:
        names.append("pipeline")
        card = run_card(config, export, step)
        write_folder(run / "pipeline", lambda folder: write_export(export, folder, card))
    return names
