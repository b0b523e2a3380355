"""The one training loop: devices, precision, players, averages, logs, checkpoints, pictures, export."""

import math
import signal
import time
from collections import UserDict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_tensorboard_available, is_wandb_available
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from ..pipelines.export import KOHYA, write_adapter, write_export, write_kohya
from .batches import Batches
from .catalog import method_named
from .checkpoint import Checkpoints, RawWeights, kept_state, restore_state, step_of, write_folder, writing
from .codec import Autoencoder
from .config import RunConfig, as_tree
from .denoiser import Denoiser
from .draws import mix
from .ema import EMA
from .errors import UserError
from .frozen import Offloaded
from .grid import save_rows
from .measure import processor, seconds
from .methods.base import Method, Parts, Progress
from .model_card import adapter_card, run_card
from .run_folder import RunFolder, flat
from .teacher import LatentTeacher, Teacher
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
        """Train to max_train_steps and export; returns the run folder. Ctrl-C saves, exports and stops."""
        self.folder.compare_config()
        source = self.checkpoints.choose(self.config.resume_from_checkpoint)
        start = step_of(source) if source else 0
        if start > self.config.max_train_steps:
            raise UserError(
                f"max_train_steps: {self.config.max_train_steps} is less than the steps of {source}; raise it"
            )
        self._build(source)
        interrupted = self._loop(start)
        if interrupted:
            self._say(f"interrupted at step {self.step}: saved and exported; repeat the command to go on")
        self._export()
        self.accelerator.end_training()
        if interrupted:
            raise KeyboardInterrupt
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
            kwargs_handlers=[replication],
        )
        if self.accelerator.distributed_type not in (DistributedType.NO, *REPLICATED):
            kind = self.accelerator.distributed_type.value
            raise UserError(
                f"accelerate's {kind} is not supported; launch with --multi_gpu (replicated weights)"
            )
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
        kind = method_named(c.method["name"])
        settings = kind.Settings(**{k: v for k, v in c.method.items() if k != "name"})
        parts = Parts(teacher, c.student, data.captions, data.classes, resolution, vae=vae)
        method: Method = kind(settings, parts)
        parts.check(method.needs)
        if self.accelerator.is_main_process:  # what is refused leaves no folder that would refuse the remedy
            self.folder.write_config()
        for frozen in (teacher, vae):
            if frozen is not None:
                frozen.to(device, DTYPES[c.mixed_precision])
        self.batches = Batches(c, method.needs, data, teacher, parts.codec, self.accelerator)
        self.offloaded = Offloaded(waiting(teacher or vae), device) if c.cpu_offload else None
        self._memory_savers(method, teacher)
        self.method = method
        self.players = method.players()
        replication.find_unused_parameters = len(self.players) > 1  # a turn leaves the other players' alone
        self.optimisers = {k: self._optimiser(p, method.optimiser(k)) for k, p in self.players.items()}
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
        if self.accelerator.is_main_process:
            self.folder.cut_log(step_of(source) if source else 0)
        if source is not None:
            self._restore(source)
        method.to(device).train()
        if self.ema is not None:
            self.ema.to(device)
        self.model = self.accelerator.prepare(method)
        self.optimisers = {k: self.accelerator.prepare(o) for k, o in self.optimisers.items()}
        if source is None and "latents" in method.needs:
            method.prepare(self.batches.latents)
        if log_with:
            self.accelerator.init_trackers("fewstep", config=flat(as_tree(c)))

    def _memory_savers(self, method: Method, teacher: Teacher | None) -> None:
        modules = [*method.modules(), *method.passed_through()]
        networks: list[Any] = [m for m in modules if hasattr(m, "enable_gradient_checkpointing")]
        if self.config.gradient_checkpointing:
            for network in networks:
                network.enable_gradient_checkpointing()
        if self.config.enable_xformers_memory_efficient_attention:
            for network in networks:
                enable_xformers(network)
        if self.config.compile:
            denoisers = [m for m in method.modules() if isinstance(m, Denoiser)]
            denoisers += [teacher.denoiser] if teacher else []
            for network in dict.fromkeys(d.network for d in denoisers):
                network.compile()

    def _optimiser(self, parameters: list[torch.nn.Parameter], own: dict[str, Any]) -> torch.optim.Optimizer:
        c = self.config
        shared: dict[str, Any] = {
            "lr": c.learning_rate,
            "betas": (c.adam_beta1, c.adam_beta2),
            "weight_decay": c.adam_weight_decay,
            "eps": c.adam_epsilon,
            **own,
        }
        if c.optimizer == "radam":
            return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **shared)
        if c.optimizer == "adamw_8bit":
            return adamw_8bit()(parameters, **shared)
        return torch.optim.AdamW(parameters, **shared)

    def _loop(self, start: int) -> bool:
        """Returns whether Ctrl-C ended it early."""
        c, stop = self.config, []
        previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
        bar = tqdm(
            total=c.max_train_steps, initial=start, unit="step", disable=not self.accelerator.is_main_process
        )
        self.begun, self.step = time.perf_counter(), start
        images = c.train_batch_size * c.gradient_accumulation_steps * self.accelerator.num_processes
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
                halting = self._any(bool(stop))
                if self.step % c.checkpointing_steps == 0 or self.step == c.max_train_steps or halting:
                    self._save()
                if halting:
                    return self.step < c.max_train_steps
        finally:
            signal.signal(signal.SIGINT, previous)
            bar.close()
        return False

    def _iteration(self, iteration: int) -> dict[str, Tensor]:
        c, micro = self.config, self.config.gradient_accumulation_steps
        batches = self.batches.micro_batches(iteration)
        carries = [Carry() for _ in batches]
        progress = Progress(iteration, c.max_train_steps, dict(self.updates))
        values: dict[str, Tensor] = {}
        turns = self.method.turns(progress)
        for player in turns:
            torch.manual_seed(mix(c.seed, iteration, self.accelerator.process_index, len(player)))
            optimiser = self.optimisers[player]
            for i, (batch, carry) in enumerate(zip(batches, carries, strict=True)):
                if i + 1 < micro:
                    with self.accelerator.no_sync(self.model):
                        out = self._backward(player, batch, progress, carry)
                else:
                    out = self._backward(player, batch, progress, carry)
                for key, value in out.items():
                    name = key if len(self.players) == 1 else f"{player}/{key}"
                    values[name] = values.get(name, 0) + value.detach().float() / micro
            limit = math.inf if c.max_grad_norm is None else c.max_grad_norm
            norm = self.accelerator.clip_grad_norm_(self.players[player], limit)
            if not torch.isfinite(norm) and c.mixed_precision != "fp16":
                raise UserError(
                    f"step {iteration + 1}: the gradient of {player} is not finite; lower --learning_rate"
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
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

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, "sum") > 0)

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
        progress = {"updates": self.updates, "seconds": self._seconds()}
        self.checkpoints.save(self.step, self._state(), optimisers, progress)

    def _seconds(self) -> float:
        """Seconds in the loop, of every call that led to this step."""
        return round(self.earlier_seconds + time.perf_counter() - self.begun, 1)

    def _cost(self) -> dict[str, Any]:
        """What the training took, for comparisons."""
        c = self.config
        images = c.train_batch_size * c.gradient_accumulation_steps * self.accelerator.num_processes
        trained = sum(p.numel() for p in {p for group in self.players.values() for p in group})
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return {
            "steps": self.step,
            "images": self.step * images,
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
        if self.ema is not None:
            self.ema.load_state_dict(split["ema."])
        for k, o in self.optimisers.items():
            o.load_state_dict(optimisers["players"][k])
            self.schedules[k].load_state_dict(optimisers["schedules"][k])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(optimisers["scaler"])
        self.updates, self.earlier_seconds = dict(progress["updates"]), progress["seconds"]

    def _save_raw(self) -> None:
        if not self.accelerator.is_main_process:
            return
        ring = RawWeights(self.run, self.config.raw_weights.keep)
        ring.save(self.step, {k: p.detach() for k, p in self.method.named_parameters() if p.requires_grad})

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.swapped()

    def _export(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.offloaded is not None:
            self.offloaded.remove()
        if self.accelerator.is_main_process:
            with self._averaged():
                export, names = self.method.export(), []
                if export.adapter is not None:
                    names.append("lora")
                    card = adapter_card(self.config, export, self.step)
                    write_folder(self.run / "lora", lambda folder: write_adapter(export, folder, card))
                    adapter = export.adapter
                    if adapter.component == "unet":
                        names.append(KOHYA)
                        name = self.run.name or "lora"
                        write_folder(self.run / KOHYA, lambda folder: write_kohya(adapter, folder, name))
                if export.model is not None:
                    names.append("pipeline")
                    card = run_card(self.config, export, self.step)
                    write_folder(self.run / "pipeline", lambda folder: write_export(export, folder, card))
            self.folder.record_export(self.step, names, self._cost())
            self._say(f"exported {', '.join(str(self.run / name) for name in names)}")
        self.accelerator.wait_for_everyone()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)


REPLICATED = (
    DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_NPU, DistributedType.MULTI_XPU,
)  # fmt: skip


def waiting(frozen: Teacher | Autoencoder | None) -> list[torch.nn.Module]:
    """What training does not call where latents and prompts are cached."""
    if isinstance(frozen, LatentTeacher):
        return [*frozen.text_encoders, frozen.vae]
    if isinstance(frozen, Autoencoder):
        return [frozen.vae]
    raise UserError("cpu_offload: there is no text encoder or autoencoder; leave it out")


def adamw_8bit() -> Any:
    """AdamW with moments of 8 bits in blocks (arXiv 2110.02861). Raises UserError where no package has it."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "optimizer: adamw_8bit needs torchao or bitsandbytes; pip install 'fewstep[quantise]', or set adamw"
            ) from None
    return AdamW8bit


def enable_xformers(network: Any) -> None:
    """diffusers' memory-efficient attention, or one line where xformers does not fit the installed torch."""
    key = "enable_xformers_memory_efficient_attention"
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{key}: xformers cannot run beside torch {torch.__version__} here ({reason}); "
            "install the xformers build for this torch on a GPU machine, or leave the key off"
        ) from error
