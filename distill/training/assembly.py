"""What a run is made of, and its state: put together, saved, restored."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    is_tensorboard_available,
    is_wandb_available,
)
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from ..config.run import RunConfig
from ..config.third_party import quiet
from ..diffusion.ema import EMA
from ..errors import UserError
from ..models.codec import Autoencoder
from ..models.frozen import Offloaded
from ..models.teacher import LatentTeacher, Teacher
from .announcements import device_name
from .batches import Batches
from .checkpoint import Checkpoints, RawWeights, kept_state, restore_state
from .contract import Method, Parts
from .conversion import Phases
from .finite import Blame, check_saved
from .launch import check_accelerator
from .memory_savers import save_memory, waiting
from .optimisers import optimiser
from .resume import progress_of, restore_average, restore_optimisers
from .run_folder import RunFolder
from .saved import ProgressFile
from .teacher_data import open_data

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Assembly:
    """The parts of one configuration's run; `_build` makes them, at the start or as a checkpoint has them.

    step    iterations made so far; begun: when the loop began, in seconds of `time.perf_counter`
    """

    step: int
    begun: float

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = RunFolder(config)
        self.run = self.folder.path
        self.checkpoints = Checkpoints(self.run, config.checkpoints_total_limit)

    def _build(self, source: Path | None) -> None:
        quiet()
        c = self.config
        replication = DistributedDataParallelKwargs()
        log_with = None if c.report_to == "none" else c.report_to
        if log_with and not TRACKERS[log_with]():
            raise UserError(
                f"report_to: {log_with} is not installed; pip install {log_with}, or leave the key off"
            )
        AcceleratorState._reset_state()  # each run of a process has its own precision
        self.accelerator = Accelerator(
            mixed_precision=c.mixed_precision,
            log_with=log_with,
            project_dir=str(self.run),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop's own
            kwargs_handlers=[replication],
        )
        check_accelerator(self.accelerator)
        if c.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        torch.manual_seed(c.seed)
        device = self.accelerator.device
        teacher = Teacher.load(c.teacher, c.resolution) if c.teacher else None
        if c.teacher and c.teacher.quantisation:
            assert isinstance(teacher, LatentTeacher)
            teacher.quantise(DTYPES[c.mixed_precision])
        vae = Autoencoder.load(c.vae) if c.vae else None
        resolution = c.resolution or (teacher.resolution if teacher else None)
        if resolution is None:
            raise UserError(
                "resolution: missing; without `teacher: {path: ...}` the image size must be given"
            )
        data = open_data(c.data, teacher, resolution)
        parts = Parts(teacher, c.student, data.captions, data.classes, resolution, vae=vae)
        method: Method = c.method.load()(c.method.settings, parts)
        parts.check(method.needs)
        if "prompts" in method.needs and c.data.caption_column is not None:
            data.need_captions()
        for frozen in (teacher, vae):
            if frozen is not None:
                frozen.to(device, DTYPES[c.mixed_precision])
        self.batches = Batches(c, method.needs, data, teacher, parts.codec, self.accelerator)
        self.offloaded = Offloaded(waiting(teacher or vae), device) if c.cpu_offload else None
        save_memory(c, method, teacher)
        self.method = method
        self.players = method.players()
        self.phases = Phases(method, c.student.conversion_steps)
        # a turn leaves the other players' parameters alone, and conversion what the method adds to the network
        replication.find_unused_parameters = len(self.players) > 1 or c.student.conversion_steps > 0
        self.optimisers = {k: optimiser(c, p, method.optimiser(k)) for k, p in self.players.items()}
        self.schedules = {
            k: get_scheduler(
                c.lr_scheduler, o, num_warmup_steps=c.lr_warmup_steps, num_training_steps=c.max_train_steps
            )
            for k, o in self.optimisers.items()
        }
        self.updates = dict.fromkeys(self.players, 0)
        self.earlier_seconds = 0.0
        averaged = method.averaged()
        self.ema = EMA(averaged, c.ema_decay, warmup=True, std=c.ema_std) if c.use_ema else None
        kept = {id(p) for p in averaged.values()}
        self.averaging = {k for k, group in self.players.items() if any(id(p) in kept for p in group)}
        if source is not None:
            self._restore(source)
        method.to(device).train()
        if self.ema is not None:
            self.ema.to(device)
        self.model = self.accelerator.prepare(self.phases)
        self.optimisers = {k: self.accelerator.prepare(o) for k, o in self.optimisers.items()}
        if source is None and "latents" in method.needs:
            method.prepare(self.batches.latents)
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.is_enabled()  # on a CPU there is one without effect
        self.blame = Blame(c.mixed_precision, scaled, self.batches, teacher, method)

    def _restore(self, source: Path) -> None:
        state, optimisers, progress = self.checkpoints.load(source)
        split = {
            p: {k[len(p) :]: v for k, v in state.items() if k.startswith(p)} for p in ("method.", "ema.")
        }
        restore_state(self.method, split["method."], source)
        restore_average(self.ema, split["ema."], source)
        restore_optimisers(self.optimisers, self.schedules, self.accelerator.scaler, optimisers, source)
        self.updates, self.earlier_seconds = progress_of(progress, self.players.keys(), source)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        optimisers = {
            "players": {k: o.state_dict() for k, o in self.optimisers.items()},
            "schedules": {k: s.state_dict() for k, s in self.schedules.items()},
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        }
        progress: ProgressFile = {
            "updates": self.updates,
            "seconds": self._seconds(),
            "batch": self._batch_size(),
        }
        state = self._state()
        self._check_finite(state)
        self.checkpoints.save(self.step, state, optimisers, progress)

    def _save_raw(self) -> None:
        if not self.accelerator.is_main_process:
            return
        ring = RawWeights(self.run, self.config.raw_weights.keep)
        weights = {k: p.detach() for k, p in self.method.named_parameters() if p.requires_grad}
        self._check_finite(weights)
        ring.save(self.step, weights)

    def _state(self) -> dict[str, Tensor]:
        state = {f"method.{k}": v for k, v in kept_state(self.method).items()}
        if self.ema is not None:
            state |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return state

    def _check_finite(self, state: Mapping[str, Tensor]) -> None:
        trained = {k for k, p in self.method.named_parameters() if p.requires_grad}
        weights = {
            k: v for k, v in state.items() if k.startswith("ema.") or k.removeprefix("method.") in trained
        }
        check_saved(weights, self.step, self._slower())

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.swapped()

    def _slower(self) -> str:
        """The remedy for a run that diverges: what is saved already would refuse another rate in its folder."""
        steps = self.checkpoints.steps()
        if not steps:
            return "lower --learning_rate"
        newest = self.checkpoints.folder(steps[-1])
        return (
            f"lower --learning_rate in another --output_dir (--resume_from_checkpoint {newest} begins there)"
        )

    def _batch_size(self) -> int:
        """Pictures of a step, of all processes."""
        c = self.config
        return c.train_batch_size * c.gradient_accumulation_steps * self.accelerator.num_processes

    def _seconds(self) -> float:
        """Seconds in the loop, of every call that led to this step."""
        return round(self.earlier_seconds + time.perf_counter() - self.begun, 1)

    def _cost(self) -> dict[str, Any]:
        """What the training took, for comparisons."""
        batch = self._batch_size()
        trained = sum(p.numel() for p in {p for group in self.players.values() for p in group})
        return {
            "steps": self.step,
            "images": self.step * batch,
            "batch": batch,
            "seconds": self._seconds(),
            "trained_parameters": trained,
            "device": f"{self.accelerator.num_processes} x {device_name(self.accelerator.device)}",
        }

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)
