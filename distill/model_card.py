"""The README.md of an exported folder: what it is, the lines that load it, how it was made."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

from ..pipelines.export import Export
from .config import RunConfig


def loading_lines(export: Export, folder: str = "pipeline") -> str:
    """Python that opens the export with plain diffusers and samples with its own arguments."""
    calls = export.sampling
    call = calls.get("2") or calls.get("default") or {}
    arguments = "".join(f", {k}={v}" for k, v in call.items())
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{folder}")\n'
        f'image = pipe("red apple"{arguments}, generator=torch.Generator().manual_seed(0)).images[0]\n'
    )


def run_card(config: RunConfig, export: Export, step: int) -> str:
    """The card of a finished or interrupted run; scores are added by `with_scores` when they are known."""
    method = config.method["name"]
    teacher = config.teacher.path if config.teacher else "none"
    rows = [
        ("method", method),
        ("teacher", teacher),
        ("student", config.student.kind),
        ("data", f"{config.data.name}, split {config.data.split}"),
        ("training steps", f"{step} of {config.max_train_steps}"),
        ("batch", config.train_batch_size * config.gradient_accumulation_steps),
        ("learning rate", config.learning_rate),
        ("made with", f"torch {torch.__version__}, diffusers {diffusers.__version__}"),
    ]
    kind = type(export.model).__name__
    out = [
        "---\nlibrary_name: diffusers\ntags: [fewstep, few-step]\n---\n",
        f"# {kind} distilled by fewstep ({method})\n"
        if export.sampling
        else f"# {kind} trained by fewstep\n",
    ]
    if export.sampling:
        out += ["```python\n" + loading_lines(export) + "```\n", "## Steps\n", steps_table(export.sampling)]
    out += ["## Training\n", markdown(("what", "value"), rows)]
    return "\n".join(out)


def steps_table(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    def call(arguments: Mapping[str, Any]) -> str:
        return ", ".join(f"`{k}={v}`" for k, v in arguments.items())

    return markdown(("network evaluations", "call arguments"), [(n, call(a)) for n, a in sampling.items()])


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
