"""`--dry_run`: what a configuration would train, hold in memory and download, as text."""

import re
from glob import glob
from pathlib import Path

from ..config.run import RunConfig
from ..data.named import NAMED, find_named
from ..data.names import STYLES
from ..data.shards import expand_braces
from ..errors import UserError
from ..models.codec import Autoencoder, is_here
from ..training.model_card import converted
from ..training.processes import num_processes
from ..training.public_names import data_line, teacher_line
from ..training.teacher_data import NAME as TAUGHT
from .plan import Plan, count, parameters, planned


def describe(config: RunConfig) -> str:
    """Parameters, memory per device, images and downloads of a run, as text. UserError as `planned`."""
    return text_of(planned(config))


def text_of(plan: Plan) -> str:
    counts = [(name, f"{n:,}") for name, n in parameters(plan.method, plan.frozen).items()]
    sections = [_heading(plan), _table("parameters", counts), _memory(plan), _work(plan), _downloads(plan)]
    return "\n\n".join(sections)


def _heading(plan: Plan) -> str:
    c, s = plan.config, plan.config.student
    kind = "all weights" if s.kind == "full" else f"LoRA of rank {s.rank}, alpha {s.lora_alpha:g}"
    if s.prediction is not None:
        kind += f", {converted(s)}"
    if s.network is not None:
        kind += f", new {s.network.get('_class_name', 'UNet2DModel')}"
    players = plan.method.players()
    trained = ("student", kind) if "student" in players else ("trained", ", ".join(players))
    rows = [("method", c.method["name"]), trained]
    if c.teacher and plan.blueprint:
        origin = plan.blueprint.origin
        rows.append(("teacher", f"{teacher_line(c.teacher)} (architecture from {origin})"))
    rows += [("data", f"{data_line(c.data)}, {plan.resolution} px"), ("output_dir", c.output_dir)]
    return _table("", rows)


def _memory(plan: Plan) -> str:
    rows = [(title, gib(size)) for title, size in plan.held.items()]
    rows.append(("sum", gib(sum(plan.held.values()))))
    if plan.memory is None or plan.activations is None:
        rows.append(("activations", "not estimated: this method's step needs values"))
    elif plan.half:
        low, high = plan.memory
        spread = f"{gib(plan.activations / 2)} to {gib(plan.activations)} (all in 16 bit to all in float32)"
        rows += [("activations, estimate", spread), ("total, estimate", f"{gib(low)} to {gib(high)}")]
    else:
        rows += [("activations, estimate", gib(plan.activations)), ("total, estimate", gib(plan.memory[1]))]
    rows.append(("not counted", "the device's libraries, temporaries of the optimiser, validation pictures"))
    return _table(f"memory per device in GiB, {plan.config.train_batch_size} images in each", rows)


def _work(plan: Plan) -> str:
    c, n, num_rows = plan.config, num_processes(), len(plan.captions)
    size = c.train_batch_size * c.gradient_accumulation_steps * n
    parts = f"{c.train_batch_size} x {c.gradient_accumulation_steps} accumulated x {n} processes"
    seen = f"{size * c.max_train_steps:,} in {c.max_train_steps:,} steps"
    if num_rows:
        seen += f", {size * c.max_train_steps / num_rows:.1f} times each of {num_rows:,}"
    rows = [("global batch", f"{size} = {parts}"), ("images seen", seen)]
    if kept := sum(plan.cached()):
        every = f", {gib(plan.caches())} GiB in all" if num_rows else ", for every image of the data"
        rows.append(("disk for caches", f"{kept / 2**10:.0f} KiB an image{every}"))
    return _table("work", rows)


def _downloads(plan: Plan) -> str:
    c = plan.config
    assert c.teacher is not None or not plan.downloads()
    rows = [
        (f"{c.teacher.path} {k}", f"about {gib(n)} GiB") for k, n in plan.downloads().items() if c.teacher
    ]
    if c.vae and not is_here(c.vae):
        sizes = count(list(Autoencoder.planned(c.vae).vae.parameters()))
        rows.append((c.vae.path, f"about {gib(4 * sizes)} GiB"))
    if c.teacher and c.teacher.lora and not Path(c.teacher.lora).expanduser().is_file():
        rows.append((c.teacher.lora, "unless the hub's cache has it"))
    rows += [(c.data.name, reason) for reason in missing_data(c.data.name)]
    rows += [(name, "unless it is here: looked up when the run starts") for name in plan.asked]
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
