"""The one training loop: turns of the players, logs, checkpoints, pictures, export."""

import math
import signal
import time
from collections import UserDict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from tqdm import tqdm

from ..config.method import as_tree
from ..diffusion.draws import mix
from ..errors import UserError
from ..writers import recover
from .announcements import MEASURED, closing, device_name, expected, opening
from .assembly import Assembly
from .contract import Progress
from .export_check import check_export
from .grid import save_rows
from .interrupts import Pending, held_back, raise_for
from .launch import check_launcher, join_on_cpus
from .measure import peak_gib, seconds
from .model_card import Made
from .run_export import write_exports
from .run_folder import flat
from .run_lock import locked
from .saved import step_of
from .trackers import log_picture


class Carry(UserDict):
    """Hands tensors from one turn to the next; not a dict, which DistributedDataParallel would copy."""


class Runner(Assembly):
    """Runs one configuration in its run folder; repeating it resumes, a finished run is left alone."""

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
            if at_once:
                self.accelerator.wait_for_everyone()  # a process that ends makes a launcher end the others
            else:
                summary = self._export()
            if stopped is None:
                self._say(f"\n{summary}")
            else:
                done = "saved, not exported" if at_once else "saved and exported"
                self._say(f"interrupted at step {self.step}: {done}; repeat the command to go on")
            self.accelerator.end_training()
            if stopped is not None:
                raise_for(stopped)
        return self.run

    def rehearse(self, iterations: int) -> list[float]:
        """Seconds of each of the first iterations, of which no weights are kept."""
        self._build(None)
        return [seconds(lambda i=i: self._iteration(i)) for i in range(iterations)]  # type: ignore[misc]

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
        self._say(
            opening(
                c, self.batches.data, batch=self._batch_size(), start=start,
                device=f"{self.accelerator.num_processes} x {device_name(self.accelerator.device)}",
            )
        )  # fmt: skip

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
        images, taken = self._batch_size(), list[float]()
        try:
            for iteration in range(start, c.max_train_steps):
                before = time.perf_counter()
                values = self._iteration(iteration)
                self.step = iteration + 1
                bar.update()
                if len(taken) < MEASURED:
                    taken.append(time.perf_counter() - before)
                    if len(taken) == MEASURED and self.step < c.max_train_steps:
                        self._say(expected(taken, c.max_train_steps - self.step))
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
        turns = self.phases.turns(progress)
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
            values["grad_norm" if len(self.players) == 1 else f"{player}/grad_norm"] = norm.detach().float()
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

    def _log(self, values: dict[str, Tensor], rate: float, bar: tqdm) -> None:
        row = {k: float(self.accelerator.reduce(v, "mean")) for k, v in values.items()}
        row["lr"] = float(next(iter(self.schedules.values())).get_last_lr()[0])  # torchao's is a tensor
        if not self.accelerator.is_main_process:
            return
        row |= {
            "images_per_second": round(rate, 2),
            "seconds": self._seconds(),
            "peak_memory_gib": round(peak_gib(self.accelerator.device), 3),
        }
        self.accelerator.log(row, step=self.step)
        written = {k: v if math.isfinite(v) else None for k, v in row.items()}  # fp16 skips such gradients
        self.folder.append_log({"step": self.step, **written})
        loss = next(v for k, v in row.items() if k.endswith("loss"))
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")

    def _captions(self) -> list[str]:
        """What validation pictures are made from."""
        return list(self.config.validation_prompts) or self.batches.data.captions[:8]

    def _grid(self) -> Path:
        return self.run / "samples" / f"step-{self.step:06d}.png"

    def _pictures(self) -> None:
        if not self.accelerator.is_main_process:
            return
        with self._averaged():
            self.method.eval()
            rows = self._picture_rows()
            self.method.train()
        if self.offloaded is not None:
            self.offloaded.rest()
        if rows:
            log_picture(self.accelerator.trackers, save_rows(rows, self._grid()), self.step)

    def _picture_rows(self) -> dict[str, Tensor]:
        """The method's pictures by row, made of no more captions at once than a device trains on."""
        captions, size = self._captions(), self.config.train_batch_size
        parts = [self.method.pictures(captions[i : i + size], seed=i) for i in range(0, len(captions), size)]
        return {title: torch.cat([part[title].cpu() for part in parts]) for title in (parts or [{}])[0]}

    def _export(self) -> str:
        """Pictures of this step, what others load, and the record of it; what there is to say of them."""
        summary = ""
        self.accelerator.wait_for_everyone()
        cost = self._cost()
        if self.accelerator.is_main_process:
            self._check_finite(self._state())
            if not self._grid().is_file():
                self._pictures()
        if self.offloaded is not None:
            self.offloaded.remove()
        if self.accelerator.is_main_process:
            grid = self._grid() if self._grid().is_file() else None
            made = Made(self.step, cost, self._captions(), grid is not None)
            with self._averaged():
                export = self.method.export()
                export.checked = check_export(self.method, export, self.batches.data.captions)
                names = write_exports(self.run, self.config, export, made, grid)
            self.folder.record_export(self.step, names, cost)
            summary = closing(self.config, export, cost)
        self.accelerator.wait_for_everyone()
        return summary
