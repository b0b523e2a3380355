"""`--dry_run`: what a configuration would train, hold in memory and download, from its architecture alone."""

import math
import os
import re
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .catalog import method_named
from .codec import Autoencoder, Codec, is_here
from .condition import Condition
from .config import RunConfig
from .data.embedded import STYLES
from .data.named import NAMED, find_named
from .data.tables import expand_braces
from .draws import Draws
from .ema import EMA
from .errors import UserError
from .known_teachers import Blueprint, blueprint, meta_teacher
from .meta_memory import LiveBytes, fused_attention, nbytes
from .methods.base import Batch, Method, Parts, Progress
from .model_card import data_line, teacher_line
from .rewards import Reward, UnloadedReward
from .runner import DTYPES, Carry
from .teacher import LatentTeacher, Teacher, lora_place
from .teacher_data import NAME as TAUGHT
from .teacher_data import captions_of, check_keys, open_data

TITLES = {
    "unet": "teacher network",
    "transformer": "teacher network",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
}
META = torch.device("meta")
Frozen = Teacher | Autoencoder | None  # what a run holds beside the student


def describe(config: RunConfig) -> str:
    """Parameters, memory per device, images and downloads of a run, as text. Reads and fetches no weights.

    UserError for whatever the run itself would refuse: a missing teacher, a setting that does not fit it.
    """
    c = config
    plan = blueprint(c.teacher) if c.teacher else None
    if c.teacher and c.teacher.lora:
        lora_place(c.teacher.lora, "teacher.lora")
    teacher = meta_teacher(c.teacher, plan.architecture, c.resolution) if c.teacher and plan else None
    vae = Autoencoder.planned(c.vae) if c.vae else None
    resolution = c.resolution or (teacher.resolution if teacher else None)
    if resolution is None:
        raise UserError("resolution: missing; without a teacher the image size must be given")
    captions, classes = _texts(c, resolution)
    kind = method_named(c.method["name"])
    settings = kind.Settings(**{k: v for k, v in c.method.items() if k != "name"})
    rewards: list[str] = []
    with META:
        parts = Parts(teacher, c.student, captions, classes, resolution, reward=unloaded(rewards), vae=vae)
        method: Method = kind(settings, parts)
        parts.check(method.needs)
        ema = EMA(method.averaged(), c.ema_decay) if c.use_ema else None
    frozen = teacher or vae
    if frozen is not None:
        frozen.to(META, DTYPES[c.mixed_precision])
    sections = [
        _heading(c, plan, resolution),
        _table("parameters", [(name, f"{n:,}") for name, n in parameters(method, frozen).items()]),
        _memory(c, method, frozen, ema, resolution),
        _work(c, method, frozen, resolution, len(captions)),
        _downloads(c, plan, teacher, rewards),
    ]
    return "\n\n".join(sections)


def parameters(method: Method, teacher: Frozen) -> dict[str, int]:
    """Numbers of parameters by title. A LoRA's student includes the network that it shares with the teacher."""
    own, players = list(method.parameters()), method.players()
    several = {f"trained as {name}": count(p) for name, p in players.items()} if len(players) > 1 else {}
    title = "all players" if several else "student"
    out = {title: count(own), "trained": count([p for p in own if p.requires_grad]), **several}
    if teacher is None:
        return out
    frozen = {
        f"{TITLES.get(name, name)} ({type(m).__name__})": count(
            [p for p in m.parameters() if not p.requires_grad]
        )
        for name, m in components(teacher).items()
    }
    return {**frozen, **out}


def held_bytes(method: Method, teacher: Frozen, ema: EMA | None) -> dict[str, int]:
    """Bytes that stay on the device during the whole run, by title."""
    trained = [p for p in method.parameters() if p.requires_grad]
    counted: set[int] = {id(p) for p in trained}
    out = {}
    for name, module in components(teacher).items():
        tensors = [t for t in tensors_of(module) if id(t) not in counted]
        counted |= {id(t) for t in tensors}
        dtype = str(getattr(module, "dtype", tensors[0].dtype)).removeprefix("torch.")
        out[f"{TITLES.get(name, name)}, {dtype}"] = nbytes(tensors)
    rest = [t for t in tensors_of(method) if id(t) not in counted]
    out["trained weights, float32"] = nbytes(trained)
    out["gradients"] = nbytes(trained)
    out["the optimiser's two moments"] = 2 * nbytes(trained)
    out["moving targets and other state of the method"] = nbytes(rest)
    if ema is not None:
        out["average of the trained weights (use_ema)"] = nbytes(ema.buffers())
    return {title: size for title, size in out.items() if size}


def step_bytes(config: RunConfig, method: Method, teacher: Frozen, resolution: int) -> int | None:
    """Bytes beyond `held_bytes` at the peak of a step, were all of it float32; None where a step needs values.

    Forward and backward of each player run on the meta device, attention without its score matrix.
    """
    method.train()
    modules: list[Any] = list(method.modules())
    if config.gradient_checkpointing:
        for module in modules:
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
    known = tensors_of(method) + [t for m in components(teacher).values() for t in tensors_of(m)]
    for t in known:
        t.data = t.data.float() if t.is_floating_point() else t.data
    for p in method.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)
            known.append(p.grad)
    batch, total = _batch(config, method, teacher, resolution), config.max_train_steps
    updates = dict.fromkeys(method.players(), 0)
    late = [Progress(i, total, updates) for i in range(max(0, total - 100), total)]  # every player has joined
    kinds = {method.turns(progress): progress for progress in late}  # iterations may differ in who moves
    with LiveBytes(known) as counter, fused_attention():
        try:
            for turns, progress in kinds.items():
                carry = Carry()
                for player in turns:
                    torch.autograd.backward(method(player, batch, progress, carry)["loss"])
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            return None
    return counter.peak


def components(teacher: Frozen) -> dict[str, nn.Module]:
    if isinstance(teacher, Autoencoder):
        return {"vae": teacher.vae}
    pipeline = teacher.pipeline.components if teacher else {}
    return {name: m for name, m in pipeline.items() if isinstance(m, nn.Module)}


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def count(tensors: list[nn.Parameter]) -> int:
    return sum(t.numel() for t in tensors)


def num_processes() -> int:
    """As torchrun and accelerate tell their processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _texts(c: RunConfig, resolution: int) -> tuple[list[str], tuple[str, ...]]:
    """Captions and classes of prompts and of embedded data. Other data are not opened: whatever classes they have may
    fit."""
    check_keys(c.data)
    if c.data.name == TAUGHT:
        return captions_of(c.data), ()
    if c.data.name not in STYLES:
        return [], ("unknown",)
    data = open_data(c.data, None, resolution)
    return data.captions, data.classes


def _batch(c: RunConfig, method: Method, teacher: Frozen, resolution: int) -> Batch:
    size = c.train_batch_size
    batch = Batch(Draws(c.seed, 0, range(size), META), captions=[""] * size)
    if "images" in method.needs:
        batch.images = torch.empty(size, 3, resolution, resolution, device=META)
    if "latents" in method.needs:
        assert isinstance(teacher, Codec)
        batch.latents = torch.empty(size, *latent_record(teacher, resolution), device=META)
    if "prompts" in method.needs:
        assert isinstance(teacher, LatentTeacher)
        shapes = teacher.family.shapes()
        texts = {k: torch.empty(size, *shape, device=META) for k, shape in shapes.items()}
        batch.condition = teacher.told(texts, {k: v[:1] for k, v in texts.items()})
    if "labels" in method.needs:
        batch.condition = Condition({"class_labels": torch.zeros(size, dtype=torch.long, device=META)}, {})
    return batch


def latent_record(codec: Codec, resolution: int) -> tuple[int, int, int]:
    """Shape of what the latent cache keeps of an image: mean and log-variance."""
    channels, height, width = codec.latent_shape(resolution)
    return 2 * channels, height, width


def prompt_size(teacher: LatentTeacher) -> int:
    """Numbers that the prompt cache keeps of a caption."""
    return sum(math.prod(shape) for shape in teacher.family.shapes().values())


def _heading(c: RunConfig, plan: Blueprint | None, resolution: int) -> str:
    s = c.student
    kind = "all weights" if s.kind == "full" else f"LoRA of rank {s.rank}, alpha {s.lora_alpha:g}"
    if s.network is not None:
        kind += f", new {s.network.get('_class_name', 'UNet2DModel')}"
    rows = [("method", c.method["name"]), ("student", kind)]
    if c.teacher and plan:
        rows.append(("teacher", f"{teacher_line(c.teacher)} (architecture from {plan.origin})"))
    rows += [("data", f"{data_line(c.data)}, {resolution} px"), ("output_dir", c.output_dir)]
    return _table("", rows)


def _memory(c: RunConfig, method: Method, teacher: Frozen, ema: EMA | None, resolution: int) -> str:
    held = held_bytes(method, teacher, ema)
    half = c.mixed_precision != "no"
    if half:
        trained = nbytes([p for p in method.parameters() if p.requires_grad])
        held["autocast's 16-bit copy of the trained weights"] = trained // 2
    if num_processes() > 1:
        held["gradient buckets of the processes' exchange"] = held["gradients"]
    total = sum(held.values())
    rows = [(title, gib(size)) for title, size in held.items()] + [("sum", gib(total))]
    peak = step_bytes(c, method, teacher, resolution)
    if peak is None:
        rows.append(("activations", "not estimated: this method's step needs values"))
    elif half:
        rows.append(
            ("activations, estimate", f"{gib(peak / 2)} to {gib(peak)} (all in 16 bit to all in float32)")
        )
        rows.append(("total, estimate", f"{gib(total + peak / 2)} to {gib(total + peak)}"))
    else:
        rows += [("activations, estimate", gib(peak)), ("total, estimate", gib(total + peak))]
    rows.append(("not counted", "the device's libraries, temporaries of the optimiser, validation pictures"))
    return _table(f"memory per device in GiB, {c.train_batch_size} images in each", rows)


def _work(c: RunConfig, method: Method, teacher: Frozen, resolution: int, num_rows: int) -> str:
    n = num_processes()
    size = c.train_batch_size * c.gradient_accumulation_steps * n
    parts = f"{c.train_batch_size} x {c.gradient_accumulation_steps} accumulated x {n} processes"
    seen = f"{size * c.max_train_steps:,} in {c.max_train_steps:,} steps"
    if num_rows:
        seen += f", {size * c.max_train_steps / num_rows:.1f} times each of {num_rows:,}"
    rows = [("global batch", f"{size} = {parts}"), ("images seen", seen)]
    needs = method.needs
    if isinstance(teacher, Codec) and "latents" in needs:
        kept = 2 * torch.Size(latent_record(teacher, resolution)).numel()
        if c.data.name == TAUGHT:  # no variance
            kept //= 2
        if isinstance(teacher, LatentTeacher) and "prompts" in needs:
            item = DTYPES[c.mixed_precision].itemsize
            kept += item * prompt_size(teacher)
        every = f", {gib(kept * num_rows)} GiB in all" if num_rows else ", for every image of the data"
        rows.append(("disk for caches", f"{kept / 2**10:.0f} KiB an image{every}"))
    return _table("work", rows)


def unloaded(asked: list[str]) -> Callable[[str], Reward]:
    """Gives stand-ins of rewards and notes their names in `asked`."""

    def note(spec: str) -> Reward:
        asked.append(spec)
        return UnloadedReward()

    return note


def _downloads(c: RunConfig, plan: Blueprint | None, teacher: Teacher | None, rewards: list[str]) -> str:
    rows = []
    if c.teacher and plan and teacher:
        item = 2 if c.teacher.variant in ("fp16", "bf16") else 4
        for name in plan.missing:
            frozen = [p for p in components(teacher)[name].parameters() if not p.requires_grad]
            rows.append((f"{c.teacher.path} {name}", f"about {gib(item * count(frozen))} GiB"))
    if c.vae and not is_here(c.vae):
        sizes = count(list(Autoencoder.planned(c.vae).vae.parameters()))
        rows.append((c.vae.path, f"about {gib(4 * sizes)} GiB"))
    if c.teacher and c.teacher.lora and not Path(c.teacher.lora).expanduser().is_file():
        rows.append((c.teacher.lora, "unless the hub's cache has it"))
    rows += [(c.data.name, reason) for reason in missing_data(c.data.name)]
    rows += [(f"reward {name}", "unless it is here: looked up when the run starts") for name in rewards]
    return _table("must be downloaded", rows or [("nothing", "")])


def missing_data(name: str) -> list[str]:
    """What of the data is not on this machine: at most one line."""
    path = Path(name).expanduser()
    if name in (*STYLES, TAUGHT) or path.exists():
        return []
    if name in NAMED:
        return [] if find_named(name) else [f"{NAMED[name].size}, fetched on first use"]
    if re.search(r"[*?\[{]", name):
        shards = list(expand_braces(str(path)))
        lacking = [s for s in shards if not glob(s, recursive=True)]
        return [f"{len(lacking)} of {len(shards)} shards or patterns match no file"] if lacking else []
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return ["a data set of the hub, unless `datasets` has cached it; its size is not known offline"]
    raise UserError(
        f"data.name: no folder {name}; give a folder of images, tar shards or a data set of the hub"
    )


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**30 else f"{size / 2**30:.3g}"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    indent = "  " if title else ""
    lines = [f"{indent}{name:<{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join([title, *lines] if title else lines)
