"""`fewstep turbo`: a few-step LoRA of one's own model from prompts alone, by ready settings of its family."""

import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..catalog.configuration import fitted, load_config, with_overrides
from ..config.run import RunConfig
from ..data.prompts import read_prompts
from ..errors import UserError
from ..planning.budget import Measured, advice, disk_needs, free_memory, full_disks, rehearse
from ..planning.dry_run import gib, text_of
from ..planning.known_teachers import blueprint
from ..planning.plan import Plan, planned
from ..settings import TeacherSettings
from ..training.measure import duration
from ..training.processes import num_processes
from ..training.run_folder import CONFIG
from ..training.runner import Runner
from ..training.teacher_data import NAME, own_guidance

PICTURES = 512  # sampled at least, unless data.images_per_prompt says another number

# Of one GPU and one evening. The methods' values are those of configs/sd15/lcd_lora.yaml and configs/flux/rcm.yaml;
# sizes and lengths are ours.
SHARED: dict[str, Any] = {
    "student": {"kind": "lora", "rank": 64, "lora_alpha": 64},
    "max_train_steps": 1000,
    "learning_rate": 1e-4,
    "adam_weight_decay": 0.0,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 50,
    "use_ema": True,
    "ema_decay": 0.99,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "validation_steps": 250,
}
LARGE: dict[str, Any] = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
}
FLOW: dict[str, Any] = {**LARGE, "method": "rcm", "student": {**SHARED["student"], "export_fused": False}}
FAMILIES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"method": "lcd", "train_batch_size": 8},
    "StableDiffusionXLPipeline": {"method": "lcd", **LARGE},
    "StableDiffusion3Pipeline": FLOW,
    "FluxPipeline": {**FLOW, "resolution": 512},
    "WanPipeline": FLOW,
}


def turbo(
    model: str, *, lora: str | None, prompts: str | None, method: str | None, output_dir: str | None,
    overrides: list[str], dry: bool,
) -> RunConfig:  # fmt: skip
    """Prints what the run takes, and unless `dry` trains and exports it. Repeating a call resumes.

    Raises UserError, beside a run's own mistakes, where memory or disk do not suffice.
    """
    config = configured(model, lora, prompts, method, output_dir, overrides)
    if Path(config.output_dir).is_file():
        raise UserError(f"output_dir: {config.output_dir} is a file; choose another --output_dir")
    if not dry and Runner(config).finished():
        print(f"{config.output_dir} is finished; nothing was changed")
        return config
    plan = planned(config)
    print(text_of(plan))
    refusals = misfits(plan)
    if dry:
        print("\n".join(["", *refusals] if refusals else ["", "memory and disk suffice here"]))
        return config
    if not (Path(config.output_dir) / CONFIG).is_file():  # else it was looked at, and goes on
        if refusals:
            raise UserError(refusals[0])
        if num_processes() == 1:
            print(f"\n{time_line(rehearse(config), plan)}", flush=True)
    Runner(config).train()
    return config


def configured(
    model: str,
    lora: str | None,
    prompts: str | None,
    method: str | None,
    output_dir: str | None,
    overrides: list[str],
) -> RunConfig:
    """The run's configuration: the family's settings with the caller's in place of them."""
    teacher = {"path": model} if lora is None else {"path": model, "lora": lora}
    kind = blueprint(TeacherSettings(**teacher)).architecture.kind
    if kind not in FAMILIES:
        raise UserError(f"model: {model} is a {kind}; turbo takes {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    data: dict[str, Any] = {"name": NAME, "prompts": prompts}
    validation: tuple[str, ...] = ()
    if prompts is not None:
        lines = read_prompts(prompts)
        data["images_per_prompt"] = math.ceil(PICTURES / len(lines))
        validation = tuple(dict.fromkeys(lines))[:4]
    name = Path(model).name or "model"
    style = f"-{Path(lora).stem}" if lora else ""
    tree = {
        "output_dir": output_dir or f"runs/turbo/{re.sub(r'[^A-Za-z0-9._-]', '-', name + style)}",
        "teacher": teacher,
        "data": data,
        **SHARED,
        **family,
        "method": method_settings(method or family["method"], own_guidance(model, kind), kind),
        "mixed_precision": precision(),
        "validation_prompts": list(validation),
    }
    return load_config(fitted(with_overrides(tree, overrides), tree))


def method_settings(name: str, guidance: float, kind: str) -> dict[str, Any]:
    """A method's settings for a teacher that is guided by `guidance`."""
    if name == "lcd":
        w = max(guidance - 1, 0.0)
        return {"name": "lcd", "w_min": w, "w_max": w, "w_export": w}
    told = kind == "FluxPipeline"  # the network itself, which needs no second evaluation
    guided = {"name": name, "guidance_scale": 1.0 if told else guidance}
    if name == "rcm":
        return {**guided, "sigma_max": 800.0, "times": [1.5, 1.4, 1.0], "fake_score_lr": 2e-5}
    if name == "dmd2":
        transformer = not kind.startswith(("StableDiffusionPipeline", "StableDiffusionXL"))
        return {**guided, **({"gan_weight": 0.0} if transformer else {})}
    return {"name": name}


def precision() -> str:
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    ):
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def misfits(plan: Plan) -> list[str]:
    """One line for the memory and for each disk that do not suffice."""
    out, free = [], free_memory()
    needed = plan.memory[0] if plan.memory else sum(plan.held.values())
    if needed > free:
        out.append(
            f"memory: the run needs about {gib(needed)} GiB, {gib(free)} are free; try {advice(plan.config)}"
        )
    for place, size, there in full_disks(disk_needs(plan)):
        out.append(
            f"disk: the run writes about {gib(size)} GiB below {place}, {gib(there)} are free; free some, or choose "
            "another --output_dir, FEWSTEP_CACHE or HF_HOME"
        )
    return out


def time_line(measured: Measured, plan: Plan) -> str:
    rows, c = len(plan.captions), plan.config
    peak = "" if measured.peak is None else f"; peak {gib(measured.peak)} GiB"
    return (
        f"measured here: {measured.sampling:.3g} s a sampled picture, {measured.iteration:.3g} s a step{peak}; "
        f"{rows:,} pictures and {c.max_train_steps:,} steps take about {duration(measured.total(c, rows))}"
    )
