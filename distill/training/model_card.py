"""The README.md of an exported folder: what it is, the lines that load it, how it was made."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from transformers import TimmWrapperModel

from ...pipelines.export import KOHYA, Export, is_own, own_parts
from ...pipelines.ip_adapter import IPAdapterFiles
from ...pipelines.pipeline_restoration import RestorationPipeline
from ..config.run import DataSettings, RunConfig
from ..config.search import SearchConfig
from ..models.lora_files import lora_place
from ..settings import TeacherSettings
from ..teachers import EMBEDDED
from ..writers import write_file
from .licence import base_model, licence_of

PROMPT = "red apple"


def loading_lines(
    export: Export,
    folder: str = "pipeline",
    *,
    own: bool | None = None,
    options: str = "",
    prompt: str = PROMPT,
) -> str:
    """Python that opens the export with plain diffusers and samples with its own arguments.

    A ControlNet's pipeline also opens its condition, an IP-Adapter's its image prompt, a restorer the picture that it
    restores.

    own: whether the folder holds code; None: whether a class of it is ours. options: further arguments. prompt: of the
    call, where it takes one
    """
    own = bool(is_own(export.model) or own_parts(export.model)) if own is None else own
    note = "  # the .py files in the folder" if own else ""
    trust = ", trust_remote_code=True" if own else ""
    shown = image_prompt(export)
    picture = picture_line(export) if shown is None else shown.loading_lines(folder)
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        + ("from diffusers.utils import load_image\n\n" if picture else "\n")
        + f'pipe = DiffusionPipeline.from_pretrained("{folder}"{options}{trust}){note}\n'
        + picture
        + f"{sampling_line(export, prompt)}\n"
    )


def picture_line(export: Export) -> str:
    """Python that opens the picture that a call needs, "" where it needs none."""
    if restores(export):
        return 'degraded = load_image("degraded.png")  # restoration.json says by what\n'
    if hasattr(export.model, "controlnet"):
        return (
            'condition = load_image("condition.png")  # see control.json; controlnet/ alone is the adapter\n'
        )
    return ""


def image_prompt(export: Export) -> IPAdapterFiles | None:
    return next((part for part in export.beside if isinstance(part, IPAdapterFiles)), None)


def restores(export: Export) -> bool:
    return isinstance(export.model, RestorationPipeline)


def adapter_loading_lines(config: RunConfig, export: Export, folder: str = "lora") -> str:
    """Python that puts the LoRA on the teacher's pipeline with plain diffusers."""
    assert export.adapter is not None and config.teacher is not None
    scheduler, teacher = type(export.adapter.scheduler).__name__, config.teacher.path
    imports, source, where = "", f'"{public(teacher)}"', "the teacher's folder or hub id"
    if teacher in EMBEDDED:
        imports = "from importlib.resources import files\n\n"
        source, where = (
            f'files("fewstep.distill") / "teachers/{EMBEDDED[teacher].name}"',
            f"{teacher} of fewstep",
        )
    styled = ""
    if config.teacher.lora is not None:  # its file, wherever the reader keeps it
        place, name = lora_place(config.teacher.lora, "teacher.lora")
        place = "." if Path(place).is_dir() else place
        styled = (
            f'pipe.load_lora_weights("{place}", weight_name="{name}")  # the LoRA that the teacher had\n'
            f"pipe.fuse_lora(lora_scale={config.teacher.lora_scale})\npipe.unload_lora_weights()\n"
        )
    return (
        f"{imports}import torch\nfrom diffusers import DiffusionPipeline, {scheduler}\n\n"
        f"# {where}; without a dtype, parts stored in half precision stay so beside others\n"
        f"pipe = DiffusionPipeline.from_pretrained({source}, dtype=torch.float32)\n"
        f"{styled}"
        f'pipe.scheduler = {scheduler}.from_pretrained("{folder}")\n'
        f'pipe.load_lora_weights("{folder}")\n'
        f"{sampling_line(export)}\n"
    )


def sampling_line(export: Export, prompt: str = PROMPT) -> str:
    """One call of `pipe`, in two steps where there are two."""
    call = export.sampling.get("2") or next(iter(export.sampling.values()))
    arguments = "".join(f", {k}={v}" for k, v in call.items())
    arguments += ", generator=torch.Generator().manual_seed(0)"
    takes = (
        inspect.signature(type(export.model).__call__).parameters
        if export.model is not None
        else {"prompt": 0}
    )
    if restores(export):
        return f"image = pipe(degraded{arguments}).images[0]"
    if hasattr(export.model, "controlnet"):
        arguments = ", image=condition" + arguments
    if shown := image_prompt(export):
        arguments = f", {shown.argument}{arguments}"
    if "prompt" in takes:
        picture = "frames[0][0]" if "num_frames" in call else "images[0]"
        return f"image = pipe({json.dumps(prompt, ensure_ascii=False)}{arguments}).{picture}"
    label = "class_labels=0" if export.model.unet.config.num_class_embeds is not None else ""
    return f"image = pipe({(label + arguments) if label else arguments[2:]}).images[0]"


def adapter_card(config: RunConfig, export: Export, step: int) -> str:
    """The card of a LoRA's folder."""
    out = [
        front_matter(config, "lora"),
        f"# LoRA {'trained' if 'default' in export.sampling else 'distilled'} by fewstep ({config.method['name']})\n",
        "```python\n" + adapter_loading_lines(config, export) + "```\n",
        "## Steps\n",
        steps_table(export.sampling),
        *checked_lines(export),
        *(
            [f"`{KOHYA}/` beside this folder holds the same LoRA in the key layout of kohya and ComfyUI.\n"]
            if export.adapter is not None and export.adapter.component == "unet"
            else []
        ),
        "## Training\n",
        training_table(config, step),
    ]
    return "\n".join(out)


def front_matter(config: RunConfig, *tags: str) -> str:
    """What the hub reads of a card; the teacher's licence holds for its students."""
    entries: dict[str, Any] = {"library_name": "diffusers"}
    if config.teacher is not None:
        entries |= licence_of(config.teacher) | base_model(config.teacher)
    entries["tags"] = ["fewstep", "few-step", *tags]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n"


def run_card(config: RunConfig, export: Export, step: int) -> str:
    """The card of a finished or interrupted run; scores are added by `with_scores` when they are known."""
    kind = type(export.model).__name__
    out = [
        front_matter(config),
        f"# {kind} distilled by fewstep ({config.method['name']})\n"
        if export.sampling
        else f"# {kind} trained by fewstep\n",
    ]
    if export.sampling:
        out += ["```python\n" + loading_lines(export) + "```\n", *package_lines(export.model)]
        out += ["## Steps\n", steps_table(export.sampling), *checked_lines(export)]
    out += ["## Training\n", training_table(config, step)]
    return "\n".join(out)


def checked_lines(export: Export) -> list[str]:
    return [f"Checked at export: {export.checked}.\n"] if export.checked else []


def is_quantised(pipeline: Any) -> bool:
    parts = pipeline.components.values()
    return any(getattr(part, "hf_quantizer", None) is not None for part in parts)


def package_lines(pipeline: Any) -> list[str]:
    """A sentence for each package beside transformers' own that opens the parts of a diffusers pipeline."""
    wrapped = any(isinstance(part, TimmWrapperModel) for part in pipeline.components.values())
    return [
        *(["Its integer weights need torchao: `pip install torchao`.\n"] if is_quantised(pipeline) else []),
        *(["Its image encoder needs timm: `pip install timm`.\n"] if wrapped else []),
    ]


def search_card(
    config: SearchConfig,
    pipeline: Any,
    sampling: dict[str, dict[str, Any]],
    notes: Sequence[tuple[str, str]],
    own: bool,
) -> str:
    """The card of a pipeline that a search found; own: whether its folder holds code."""
    name = config.method["name"]
    # without it the integer weights' network opens in bfloat16
    options = ", dtype=torch.float32" if is_quantised(pipeline) else ""
    export = Export(pipeline, sampling=sampling)
    rows = [
        ("method", name),
        ("student", Path(config.student.path).name),
        ("found for", f"{config.steps} network evaluations; for no other number"),
        *notes,
        ("searched on", f"{public(config.data.name)}, split {config.data.split}, seed {config.seed}"),
        ("fitness", fitness_line(config)),
        ("made with", f"torch {torch.__version__}, diffusers {diffusers.__version__}"),
    ]
    out = [
        "---\nlibrary_name: diffusers\ntags: [fewstep, few-step]\n---\n",
        f"# {type(pipeline).__name__} found by fewstep ({name})\n",
        "```python\n" + loading_lines(export, own=own, options=options) + "```\n",
        *package_lines(pipeline),
        "## Steps\n",
        steps_table(sampling),
        "## Search\n",
        markdown(("what", "value"), rows),
    ]
    return "\n".join(out)


def fitness_line(config: SearchConfig) -> str:
    f = config.fitness
    if f.kind == "kid":
        return f"KID ({f.extractor}) to {config.data.split}, lower is better"
    text = f"log({f.text})" if f.log_text else f.text
    return f"{text} + {f.weight:g} x {f.quality}"


def training_table(config: RunConfig, step: int) -> str:
    """How the student was made."""
    method = config.method["name"]
    teacher = teacher_line(published(config.teacher)) if config.teacher else "none"
    rows = [
        ("method", method),
        ("teacher", teacher),
        *([("licence of the teacher", licence_line(config.teacher))] if config.teacher else []),
        ("student", config.student.kind),
        ("data", data_line(published(config.data))),
        ("training steps", f"{step} of {config.max_train_steps}"),
        ("batch", config.train_batch_size * config.gradient_accumulation_steps),
        ("learning rate", config.learning_rate),
        ("made with", f"torch {torch.__version__}, diffusers {diffusers.__version__}"),
    ]
    return markdown(("what", "value"), rows)


def public(name: str) -> str:
    """What a card calls a model or data: an embedded name or hub id as it is, of what lies elsewhere the last part."""
    place = Path(name).expanduser()
    if name in EMBEDDED or (not place.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)):
        return name
    return place.resolve().name


def published(part: Any) -> Any:
    """TeacherSettings or DataSettings as a card may name them."""
    key = "path" if isinstance(part, TeacherSettings) else "name"
    return replace(part, **{key: public(getattr(part, key))})


def teacher_line(teacher: TeacherSettings) -> str:
    """What a student was distilled from."""
    if teacher.lora is None:
        return teacher.path
    place, name = lora_place(teacher.lora, "teacher.lora")
    return f"{teacher.path} with {teacher.lora_scale:g} x {name if Path(place).is_dir() else teacher.lora}"


def licence_line(teacher: TeacherSettings) -> str:
    stated = licence_of(teacher)
    line = stated.get("license_name") or stated.get("license") or "not stated in its model card"
    return f"{line}; that of its LoRA holds too" if teacher.lora else line


def data_line(data: DataSettings) -> str:
    """What a student was trained on."""
    if data.prompts is None:
        return f"{data.name}, split {data.split}"
    return f"the teacher's own latents of {Path(data.prompts).name}"


def with_scores(folder: Path, table: str) -> None:
    """Put the table of an evaluation into the card of an exported folder, in place of an earlier one."""
    card = folder / "README.md"
    before = card.read_text().split("\n## Scores\n")[0].rstrip("\n") if card.is_file() else f"# {folder.name}"
    write_file(card, f"{before}\n\n## Scores\n\n{table}")


def steps_table(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    def call(arguments: Mapping[str, Any]) -> str:
        return ", ".join(f"`{k}={v}`" for k, v in arguments.items())

    return markdown(("network evaluations", "call arguments"), [(n, call(a)) for n, a in sampling.items()])


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
