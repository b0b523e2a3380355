"""The one training loop: devices, precision, players, averages, logs, checkpoints, pictures, export."""

import math
import signal
import time
from collections import UserDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    gather,
    is_tensorboard_available,
    is_wandb_available,
)
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from ..config.method import as_tree
from ..config.run import RunConfig
from ..diffusion.draws import mix
from ..diffusion.ema import EMA
from ..errors import UserError
from ..models.codec import Autoencoder
from ..models.frozen import Offloaded
from ..models.teacher import LatentTeacher, Teacher
from ..writers import recover, writing
from .batches import Batches
from .checkpoint import Checkpoints, ProgressFile, RawWeights, kept_state, restore_state, step_of
from .contract import Method, Parts, Progress
from .export_check import check_export
from .finite import Blame, check_saved
from .grid import save_rows
from .interrupts import Pending, held_back, raise_for
from .launch import check_accelerator, check_launcher, join_on_cpus
from .measure import processor, seconds
from .memory_savers import save_memory, waiting
from .optimisers import optimiser
from .resume import progress_of, restore_average, restore_optimisers
from .run_export import write_exports
from .run_folder import RunFolder, flat
from .run_lock import locked
from .teacher_data import open_data

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Carry(UserDict):
    """Hands tensors from one turn to the next; not a dict, which DistributedDataParallel would copy."""


class Runner:
    """Runs one configuration in its run folder; repeating it resumes, a finished run is left alone."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = RunFolder(config)
        self.run = self.folder.path
        self.checkpoints = Checkpoints(self.run, config.checkpoints_total_limit)

    def finished(self) -> bool:
        """Whether the folder holds what this configuration's last step exports."""
        return self.folder.finished()

    def train(self) -> Path:
        """Train to max_train_steps and export; returns the run folder.

        Ctrl-C saves, exports and stops; SIGTERM and SIGHUP, which leave little time, save and stop. Raises UserError
        where another command is at work in the folder.
        """
        check_launcher(self.config)
        join_on_cpus()
        with locked(self.run):
            self.folder.compare_config()
            source = self.checkpoints.choose(self.config.resume_from_checkpoint)
            start = step_of(source) if source else 0
            if start > self.config.max_train_steps:
                raise UserError(
                    f"max_train_steps: {self.config.max_train_steps} is less than the steps of {source}; raise it"
                )
            self._build(source)
            self._open(start)
            stopped = self._loop(start)
            at_once = stopped not in (None, signal.SIGINT)
            if stopped is not None:
                done = "saved, not exported" if at_once else "saved and exported"
                self._say(f"interrupted at step {self.step}: {done}; repeat the command to go on")
            if at_once:
                self.accelerator.wait_for_everyone()  # a process that ends makes a launcher end the others
            else:
                self._export()
            self.accelerator.end_training()
            if stopped is not None:
                raise_for(stopped)
        return self.run

    def rehearse(self, iterations: int) -> list[float]:
        """Seconds of each of the first iterations, of which no weights are kept."""
        self._build(None)
        return [seconds(lambda i=i: self._iteration(i)) for i in range(iterations)]  # type: ignore[misc]

    def _build(self, source: Path | None) -> None:
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
        replication.find_unused_parameters = len(self.players) > 1  # a turn leaves the other players' alone
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
        self.model = self.accelerator.prepare(method)
        self.optimisers = {k: self.accelerator.prepare(o) for k, o in self.optimisers.items()}
        if source is None and "latents" in method.needs:
            method.prepare(self.batches.latents)
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.is_enabled()  # on a CPU there is one without effect
        self.blame = Blame(c.mixed_precision, scaled, self.batches, teacher, method)

    def _open(self, start: int) -> None:
        """What a killed call left is put right and the folder's texts are written, once nothing is refused any more
        and all processes have seen the folder."""
        c = self.config
        if self.accelerator.is_main_process:
            recover(self.run)
            self.folder.write_config()
            self.folder.cut_log(start)
        if c.report_to != "none":
            self.accelerator.init_trackers("fewstep", config=flat(as_tree(c)))

    def _loop(self, start: int) -> int | None:
        """Returns the number of the signal that ended it early, None for none."""
        with held_back() as pending:
            return self._steps(start, pending)

    def _steps(self, start: int, pending: Pending) -> int | None:
        c = self.config
        bar = tqdm(
            total=c.max_train_steps, initial=start, unit="step", disable=not self.accelerator.is_main_process
        )
        self.begun, self.step = time.perf_counter(), start
        images = self._batch_size()
        try:
            for iteration in range(start, c.max_train_steps):
                values = self._iteration(iteration)
                self.step = iteration + 1
                bar.update()
                if self.step % c.logging_steps == 0 or self.step == c.max_train_steps:
                    rate = images * (self.step - start) / (time.perf_counter() - self.begun)
                    self._log(values, rate, bar)
                if c.validation_steps and self.step % c.validation_steps == 0:
                    self._pictures()
                if c.raw_weights.every and self.step % c.raw_weights.every == 0:
                    self._save_raw()
                stopped = self._gravest(pending.number)
                if self.step % c.checkpointing_steps == 0 or self.step == c.max_train_steps or stopped:
                    self._save()
                if stopped is not None and (self.step < c.max_train_steps or stopped != signal.SIGINT):
                    return stopped
        finally:
            bar.close()
        return None

    def _iteration(self, iteration: int) -> dict[str, Tensor]:
        c, micro = self.config, self.config.gradient_accumulation_steps
        batches = self.batches.micro_batches(iteration)
        carries = [Carry() for _ in batches]
        progress = Progress(iteration, c.max_train_steps, dict(self.updates))
        values: dict[str, Tensor] = {}
        turns = self.method.turns(progress)
        for player in turns:
            torch.manual_seed(mix(c.seed, iteration, self.accelerator.process_index, len(player)))
            loss = torch.zeros((), device=self.accelerator.device)
            for i, (batch, carry) in enumerate(zip(batches, carries, strict=True)):
                if i + 1 < micro:
                    with self.accelerator.no_sync(self.model):
                        out = self._backward(player, batch, progress, carry)
                else:
                    out = self._backward(player, batch, progress, carry)
                loss += out["loss"].detach() / micro
                for key, value in out.items():
                    name = key if len(self.players) == 1 else f"{player}/{key}"
                    values[name] = values.get(name, 0) + value.detach().float() / micro
            limit = math.inf if c.max_grad_norm is None else c.max_grad_norm
            norm = self.accelerator.clip_grad_norm_(self.players[player], limit)
            if torch.isfinite(norm + loss):
                self.blame.skipped = 0
            else:
                self.blame.check(iteration + 1, player, float(loss), batches, self._slower())
            self.optimisers[player].step()
            self.optimisers[player].zero_grad(set_to_none=True)
            self.schedules[player].step()
            self.updates[player] += 1
            self.method.after(player)
        if self.ema is not None and self.averaging.intersection(turns):
            self.ema.update()
        return values

    def _backward(self, player: str, batch: Any, progress: Progress, carry: Carry) -> dict[str, Tensor]:
        out = self.model(player, batch, progress, carry)
        self.accelerator.backward(out["loss"] / self.config.gradient_accumulation_steps)
        return out

    def _gravest(self, number: int | None) -> int | None:
        """The signal that any of the processes was sent; one that leaves little time goes before Ctrl-C."""
        if self.accelerator.num_processes == 1:
            return number
        weight = 0 if number is None else number + (0 if number == signal.SIGINT else 1000)
        votes = gather(torch.tensor([weight], device=self.accelerator.device))
        return int(votes.max()) % 1000 or None

    def _slower(self) -> str:
        """The remedy for a run that diverges: what is saved already would refuse another rate in its folder."""
        steps = self.checkpoints.steps()
        if not steps:
            return "lower --learning_rate"
        newest = self.checkpoints.folder(steps[-1])
        return (
            f"lower --learning_rate in another --output_dir (--resume_from_checkpoint {newest} begins there)"
        )

    def _log(self, values: dict[str, Tensor], rate: float, bar: tqdm) -> None:
        row = {k: float(self.accelerator.reduce(v, "mean")) for k, v in values.items()}
        row["lr"] = float(next(iter(self.schedules.values())).get_last_lr()[0])  # torchao's is a tensor
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(row, step=self.step)
        self.folder.append_log({"step": self.step, **row, "images_per_second": round(rate, 2)})
        loss = next(v for k, v in row.items() if k.endswith("loss"))
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")

    def _pictures(self) -> None:
        captions = list(self.config.validation_prompts) or self.batches.data.captions[:8]
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            self.method.eval()
            rows = self.method.pictures(captions, seed=0)
            self.method.train()
        if self.offloaded is not None:
            self.offloaded.rest()
        if rows:
            path = self.run / "samples" / f"step-{self.step:06d}.png"
            with writing(path):
                save_rows(rows, path)

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

    def _batch_size(self) -> int:
        """Pictures of a step, of all processes."""
        c = self.config
        return c.train_batch_size * c.gradient_accumulation_steps * self.accelerator.num_processes

    def _check_finite(self, state: Mapping[str, Tensor]) -> None:
        trained = {k for k, p in self.method.named_parameters() if p.requires_grad}
        weights = {
            k: v for k, v in state.items() if k.startswith("ema.") or k.removeprefix("method.") in trained
        }
        check_saved(weights, self.step, self._slower())

    def _seconds(self) -> float:
        """Seconds in the loop, of every call that led to this step."""
        return round(self.earlier_seconds + time.perf_counter() - self.begun, 1)

    def _cost(self) -> dict[str, Any]:
        """What the training took, for comparisons."""
        batch = self._batch_size()
        trained = sum(p.numel() for p in {p for group in self.players.values() for p in group})
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return {
            "steps": self.step,
            "images": self.step * batch,
            "batch": batch,
            "seconds": self._seconds(),
            "trained_parameters": trained,
            "device": f"{self.accelerator.num_processes} x {name}",
        }

    def _state(self) -> dict[str, Tensor]:
        state = {f"method.{k}": v for k, v in kept_state(self.method).items()}
        if self.ema is not None:
            state |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return state

    def _restore(self, source: Path) -> None:
        state, optimisers, progress = self.checkpoints.load(source)
        split = {
            p: {k[len(p) :]: v for k, v in state.items() if k.startswith(p)} for p in ("method.", "ema.")
        }
        restore_state(self.method, split["method."], source)
        restore_average(self.ema, split["ema."], source)
        restore_optimisers(self.optimisers, self.schedules, self.accelerator.scaler, optimisers, source)
        self.updates, self.earlier_seconds = progress_of(progress, self.players.keys(), source)

    def _save_raw(self) -> None:
        if not self.accelerator.is_main_process:
            return
        ring = RawWeights(self.run, self.config.raw_weights.keep)
        weights = {k: p.detach() for k, p in self.method.named_parameters() if p.requires_grad}
        self._check_finite(weights)
        ring.save(self.step, weights)

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.swapped()

    def _export(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.offloaded is not None:
            self.offloaded.remove()
        if self.accelerator.is_main_process:
            self._check_finite(self._state())
            with self._averaged():
                export = self.method.export()
                export.checked = check_export(self.method, export, self.batches.data.captions)
                names = write_exports(self.run, self.config, export, self.step)
            self.folder.record_export(self.step, names, self._cost())
            self._say(f"exported {', '.join(str(self.run / name) for name in names)}")
        self.accelerator.wait_for_everyone()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)
