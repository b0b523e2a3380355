"""Whether a planned run fits this machine, and how long it will take by a few measured steps."""

import dataclasses
import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub.constants
import psutil
import torch
from accelerate import PartialState

from ..config.run import RunConfig
from ..data.cache import cache_directory, cache_in
from ..errors import UserError
from ..training.measure import PeakMemory, seconds
from ..training.runner import Runner
from ..training.teacher_data import NAME as TAUGHT
from ..training.teacher_data import STEPS, TeacherData
from .meta_memory import nbytes
from .plan import Plan, components

MEASURED = 6  # iterations, the first one not counted: a whole cycle of methods whose players take five turns
SAMPLER_STEPS = 4  # of the measured picture


@dataclass(frozen=True)
class Measured:
    """seconds: of a sampled latent and of an iteration; peak: bytes, None where the system does not tell."""

    sampling: float
    iteration: float
    peak: int | None

    def total(self, config: RunConfig, num_rows: int) -> float:
        """Seconds of sampling all rows and of all iterations."""
        return num_rows * self.sampling + config.max_train_steps * self.iteration


def free_memory() -> int:
    """Bytes that can still be allocated on the device that a run would take."""
    device = PartialState().device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def disk_needs(plan: Plan) -> dict[Path, int]:
    """Bytes that a run writes, by the folder that they go to: caches, checkpoints with the export, downloads."""
    c = plan.config
    trained = nbytes([p for p in plan.method.parameters() if p.requires_grad])
    state = trained * (4 if c.use_ema else 3)  # weights, two moments, average
    kept = (c.checkpoints_total_limit or c.max_train_steps // c.checkpointing_steps) + 1
    exported = 0
    if c.student.kind == "full" or c.student.export_fused:
        exported = sum(4 * p.numel() for m in components(plan.frozen).values() for p in m.parameters())
    return {
        cache_directory(): plan.caches(),
        Path(c.output_dir): kept * state + trained + exported,
        Path(huggingface_hub.constants.HF_HUB_CACHE): sum(plan.downloads().values()),
    }


def full_disks(needs: dict[Path, int]) -> list[tuple[Path, int, int]]:
    """Folder, bytes wanted and bytes free of every file system that they would fill."""
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        place = there.stat().st_dev
        wanted[place] = (wanted.get(place, (there, 0))[0], wanted.get(place, (there, 0))[1] + size)
    return [
        (place, size, free)
        for place, size in wanted.values()
        if size > (free := shutil.disk_usage(place).free)
    ]


def advice(config: RunConfig) -> str:
    """What makes a run smaller, of the options that it does not use yet."""
    c = config
    options = [
        ("--gradient_checkpointing", not c.gradient_checkpointing),
        ("--mixed_precision bf16", c.mixed_precision == "no"),
        (f"--train_batch_size {max(1, c.train_batch_size // 2)}", c.train_batch_size > 1),
        ("--cpu_offload", not c.cpu_offload),
        (
            "--teacher.quantisation w8",
            c.student.kind == "lora" and not (c.teacher and c.teacher.quantisation),
        ),
        ("--optimizer adamw_8bit", c.optimizer == "adamw"),
        (f"--resolution {(c.resolution or 0) // 2}", (c.resolution or 0) >= 1024),
        (f"--student.rank {c.student.rank // 4}", c.student.kind == "lora" and c.student.rank > 16),
    ]
    return ", ".join(flag for flag, helps in options if helps) or "a smaller model or a larger device"


def rehearse(config: RunConfig) -> Measured:
    """Loads the teacher, samples one batch of latents and makes a few iterations; nothing of it is kept.

    Raises UserError where the device's memory does not suffice.
    """
    with TemporaryDirectory() as folder, cache_in(folder):
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a photograph\n")
        steps = config.data.num_inference_steps or STEPS
        own: Any = config  # pydantic's dataclasses are no dataclasses to mypy
        data = dataclasses.replace(
            own.data, name=TAUGHT, prompts=str(prompts), images_per_prompt=config.train_batch_size,
            num_inference_steps=min(SAMPLER_STEPS, steps),
        )  # fmt: skip
        short = dataclasses.replace(
            own, output_dir=folder, data=data, report_to="none", resume_from_checkpoint=None
        )
        runner = Runner(short)
        try:
            with PeakMemory(PartialState().device) as peak:
                taken = runner.rehearse(MEASURED)[1:]
                made = runner.batches.data
                assert isinstance(made, TeacherData)
                texts = runner.batches.prompts.__getitem__
                sampling = seconds(lambda: made.make(0, len(made), texts)) / len(made)
        except torch.OutOfMemoryError as error:
            raise UserError(f"memory: a first step does not fit the device; try {advice(config)}") from error
        finally:
            del runner
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return Measured(sampling * steps / made.num_inference_steps, sum(taken) / len(taken), peak.bytes)
