"""What a run says of itself: what it is before the first step, how long it takes, and what to do with its result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...pipelines.export import Export
from ..config.run import RunConfig
from ..config.search import SearchConfig
from ..data.images import ImageData
from .card_code import adapter_loading_lines, has_code, restores
from .measure import duration, processor
from .model_card import called, converted
from .public_names import data_line, teacher_line
from .teacher_data import NAME as MADE_BY_TEACHER

MEASURED = 3  # steps before the time is said, the first of which warms up


def listed(rows: Sequence[tuple[str, str]]) -> str:
    """A line for each row, and for each further line of its text."""
    return "\n".join(
        f"{title if i == 0 else '':<9} {line}"
        for title, text in rows
        for i, line in enumerate(text.splitlines())
    )


def opening(config: RunConfig, data: ImageData, *, batch: int, start: int, device: str) -> str:
    """Five lines: method, teacher, data, steps, device and folder. batch: pictures of a step of all processes."""
    student = "all weights" if config.student.kind == "full" else f"a LoRA of rank {config.student.rank}"
    if config.student.prediction is not None:
        student += f", {converted(config.student)}"
    captions = len({*data.captions} - {""})
    kind = "latents" if config.data.name == MADE_BY_TEACHER else "pictures"
    done = f", {start:,} of them done" if start else ""
    first = start + MEASURED
    time = f"; the expected time after step {first}" if first < config.max_train_steps else ""
    accumulated = config.gradient_accumulation_steps
    micro = f" ({accumulated} accumulated)" if accumulated > 1 else ""
    return listed(
        [
            ("method", f"{called(config)}, {student}"),
            ("teacher", teacher_line(config.teacher) if config.teacher is not None else "none"),
            ("data", f"{data_line(config.data)}: {len(data):,} {kind}, {captions or 'no'} captions"),
            ("steps", f"{config.max_train_steps:,}{done}, batch {batch:,}{micro}"),
            (
                "device",
                f"{device}; results in {config.output_dir}{time}",
            ),
        ]
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def expected(seconds: Sequence[float], left: int) -> str:
    """The time that `left` steps take. seconds: of the steps of this call so far."""
    later = seconds[1:]
    step = sum(later) / len(later)
    return f"{'time':<9} about {duration(step * left)} for the other {left:,} steps ({step:.3g} s a step)"


def closing(config: RunConfig, export: Export, training: dict[str, Any]) -> str:
    """Where everything lies, the Python that loads it, the command that scores it."""
    run = Path(config.output_dir)
    rows = [
        ("finished", f"{training['steps']:,} steps in {duration(training['seconds'])}"),
        *([("pipeline", str(run / "pipeline"))] if export.model is not None else []),
        *([("LoRA", str(run / "lora"))] if export.adapter is not None else []),
        ("log", str(run / "log.jsonl")),
        *([("samples", str(run / "samples"))] if (run / "samples").is_dir() else []),
    ]
    if export.sampling:
        rows += [("load", loading(config, export)), ("score", scoring(config, export))]
    return listed(rows)


def loading(config: RunConfig, export: Export) -> str:
    """Python that opens what lies on this machine."""
    run = Path(config.output_dir)
    if export.model is not None:
        return opened(run / "pipeline", has_code(export))
    assert config.teacher is not None
    lines = adapter_loading_lines(config, export, str(run / "lora"), here=True).splitlines()
    return "\n".join(line for line in lines[:-1] if line and not line.startswith("#"))


def opened(pipeline: Path, has_code: bool) -> str:
    """Two lines of Python."""
    trust = ", trust_remote_code=True" if has_code else ""
    return f'from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained("{pipeline}"{trust})'


def scoring(config: RunConfig, export: Export) -> str:
    """The command that scores the export."""
    pipeline = Path(config.output_dir) / "pipeline"
    if export.model is None:
        return (
            "repeat the command with --student.export_fused true, which exports a pipeline, then\n"
            f"fewstep evaluate {pipeline}{_steps(export)}{_data(config)}"
        )
    if restores(export):
        run = pipeline.parent
        return f"python scripts/benchmark_restoration.py {run}/config.yaml --output {run}/scores"
    return f"fewstep evaluate {pipeline}{_steps(export)}{_data(config)}"


def _steps(export: Export) -> str:
    known = [int(n) for n in export.sampling if n.isdigit()]
    if not known:
        call = next(iter(export.sampling.values()))
        return f" --steps {call.get('num_inference_steps', 50)}"
    few = [n for n in known if n in (1, 2, 4)] or known[:3]
    return " --steps " + " ".join(map(str, few))


def _data(config: RunConfig) -> str:
    """Prompts have no pictures to compare with."""
    return " --data FOLDER_OF_PICTURES" if config.data.name == MADE_BY_TEACHER else ""


def search_opening(config: SearchConfig, tried: int, device: str) -> str:
    """Five lines: method, student, data, candidates, device and folder. tried: candidates of earlier calls."""
    done = f", {tried:,} of them scored" if tried else ""
    return listed(
        [
            ("method", called(config)),
            ("student", config.student.path),
            ("data", f"{config.data.name}, split {config.data.split}"),
            ("search", f"{config.max_candidates:,} candidates{done}, {config.num_images:,} pictures each"),
            ("device", f"{device}; results in {config.output_dir}"),
        ]
    )


def search_closing(config: SearchConfig, *, has_code: bool) -> str:
    """As `closing`; has_code: whether the pipeline's folder holds some."""
    run = Path(config.output_dir)
    return listed(
        [
            ("pipeline", str(run / "pipeline")),
            ("log", str(run / "log.jsonl")),
            ("load", opened(run / "pipeline", has_code)),
            ("score", f"fewstep evaluate {run / 'pipeline'} --steps {config.steps}"),
        ]
    )
