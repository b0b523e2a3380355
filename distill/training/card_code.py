"""The Python of a model card: what opens an export with plain diffusers and samples from it."""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import TimmWrapperModel

from ...pipelines.export import Export, is_own, own_parts
from ...pipelines.ip_adapter import IPAdapterFiles
from ...pipelines.pipeline_restoration import RestorationPipeline
from ..config.run import RunConfig
from ..models.lora_files import lora_place
from ..teachers import EMBEDDED
from .public_names import public

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
    own = has_code(export) if own is None else own
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


def has_code(export: Export) -> bool:
    """Whether a class of the export stands in a file of ours, which goes along."""
    return bool(is_own(export.model) or own_parts(export.model))


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


def takes_prompt(export: Export) -> bool:
    """Whether a call of the pipeline begins with a text; a LoRA is of pipelines that do."""
    return export.model is None or "prompt" in inspect.signature(type(export.model).__call__).parameters


def adapter_loading_lines(
    config: RunConfig, export: Export, folder: str = "lora", *, prompt: str = PROMPT, here: bool = False
) -> str:
    """Python that puts the LoRA on the teacher's pipeline with plain diffusers.

    A teacher that lies in a folder is opened by that folder's name, from where the reader keeps it; where `here`, by
    its place on this machine.
    """
    assert export.adapter is not None and config.teacher is not None
    scheduler, teacher = type(export.adapter.scheduler).__name__, config.teacher
    imports, source = "", f'"{teacher.path if here else public(teacher.path)}"'
    where = "the teacher's hub id"
    if teacher.path in EMBEDDED:
        imports = "from importlib.resources import files\n\n"
        source = f'files("fewstep.distill") / "teachers/{EMBEDDED[teacher.path].name}"'
        where = f"{teacher.path} of fewstep"
    elif Path(teacher.path).expanduser().is_dir():
        where = "the teacher's folder, where you keep it"
    options = "".join(
        f', {key}="{value}"'
        for key, value in (("variant", teacher.variant), ("revision", teacher.revision))
        if value is not None
    )
    styled = ""
    if teacher.lora is not None:  # its file, wherever the reader keeps it
        place, name = lora_place(teacher.lora, "teacher.lora")
        place = "." if Path(place).is_dir() and not here else place
        styled = (
            f'pipe.load_lora_weights("{place}", weight_name="{name}")  # the LoRA that the teacher had\n'
            f"pipe.fuse_lora(lora_scale={teacher.lora_scale})\npipe.unload_lora_weights()\n"
        )
    return (
        f"{imports}import torch\nfrom diffusers import DiffusionPipeline, {scheduler}\n\n"
        f"# {where}; without a dtype, parts stored in half precision stay so beside others\n"
        f"pipe = DiffusionPipeline.from_pretrained({source}{options}, dtype=torch.float32)\n"
        f"{styled}"
        f'pipe.scheduler = {scheduler}.from_pretrained("{folder}")\n'
        f'pipe.load_lora_weights("{folder}")\n'
        f"{sampling_line(export, prompt)}\n"
    )


def sampling_line(export: Export, prompt: str = PROMPT) -> str:
    """One call of `pipe`, in two steps where there are two."""
    call = export.sampling.get("2") or next(iter(export.sampling.values()))
    arguments = "".join(f", {k}={v}" for k, v in call.items())
    arguments += ", generator=torch.Generator().manual_seed(0)"
    if restores(export):
        return f"image = pipe(degraded{arguments}).images[0]"
    if hasattr(export.model, "controlnet"):
        arguments = ", image=condition" + arguments
    if shown := image_prompt(export):
        arguments = f", {shown.argument}{arguments}"
    if takes_prompt(export):
        picture = "frames[0][0]" if "num_frames" in call else "images[0]"
        return f"image = pipe({json.dumps(prompt, ensure_ascii=False)}{arguments}).{picture}"
    label = "class_labels=0" if export.model.unet.config.num_class_embeds is not None else ""
    return f"image = pipe({(label + arguments) if label else arguments[2:]}).images[0]"


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
