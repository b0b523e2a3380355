"""Whether an exported pipeline draws what the method's own sampler draws, asked once at every export."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.export import Export
from ..diffusion.generator import seeded
from ..models.teacher import LatentTeacher
from .contract import Method, Rehearsal

TOLERANCE = 1e-3  # of the largest value, between float32 networks; rounding gives up to 1e-5
HALF_TOLERANCE = (
    0.1  # where frozen parts of the run are in half precision, and those of the export in float32
)
WARNING = "the exported pipeline does not draw what was trained"


def check_export(method: Method, export: Export, captions: Sequence[str]) -> str:
    """Draws one sample in the fewest steps of sampling.json by both; a sentence for the card.

    Where a network is nowhere but in the run, a LoRA without a fused pipeline, the teacher's own pipeline is taken.
    Warns where they differ by more than rounding.
    """
    steps = min((int(n) for n in export.sampling if n.isdigit()), default=None)
    if steps is None:
        return "not compared with a sampler of training: the calls name no number of steps"
    if not on_one_device(method, export):
        return "not compared with the sampler of training: parts of the run wait on another device"
    training = method.training
    method.eval()
    try:
        rehearsal = method.rehearsal(list(captions[:1]) or [""], steps, seeded(1, 0))
        if rehearsal is None:
            return "not compared with a sampler of training"
        drawn = by_pipeline(method, export, rehearsal, export.sampling[str(steps)])
    finally:
        method.train(training)
    wanted = rehearsal.x0.float().to(drawn.device)
    if rehearsal.pixels:
        wanted = (wanted / 2 + 0.5).clamp(0, 1)
    gap = float((drawn - wanted).abs().max() / wanted.abs().max())
    found = f"{steps} step{'s' if steps > 1 else ''}, one sample of the same noise: largest difference to the sampler "
    found += f"of training {gap:.0e} of the largest value"
    if gap <= (HALF_TOLERANCE if in_half(method) else TOLERANCE):
        return found
    warnings.warn(f"{WARNING}: {found}", RuntimeWarning, stacklevel=2)
    return f"**{WARNING}**: {found}"


@torch.no_grad()
def by_pipeline(method: Method, export: Export, rehearsal: Rehearsal, call: dict[str, Any]) -> Tensor:
    """The sample (1, C, H, W) as the exported pipeline's call gives it."""
    teacher, inputs = method.parts.teacher, dict(rehearsal.inputs)
    if export.model is not None:
        pipeline = export.model
    else:
        assert export.adapter is not None and isinstance(teacher, LatentTeacher)
        pipeline = teacher.sampler()
        pipeline.scheduler = export.adapter.scheduler
        inputs |= teacher.family.call_texts(teacher.encode_prompts(inputs.pop("prompt")))
    pipeline.set_progress_bar_config(disable=True)
    output_type = "pt" if rehearsal.pixels else "latent"
    drawn = pipeline(**inputs, **call, generator=seeded(1, 0), output_type=output_type, return_dict=False)[0]
    if not rehearsal.pixels and isinstance(teacher, LatentTeacher):
        drawn = teacher.family.unpacked(drawn, teacher.resolution)
    return drawn.float()


def networks(method: Method, export: Export) -> list[nn.Module]:
    exported = getattr(export.model, "components", {}).values()
    teacher = method.parts.teacher.modules() if method.parts.teacher is not None else []
    return [method, *teacher, *(m for m in exported if isinstance(m, nn.Module))]


def on_one_device(method: Method, export: Export) -> bool:
    return len({p.device for m in networks(method, export) for p in m.parameters()}) <= 1


def in_half(method: Method) -> bool:
    parts = [method, *(method.parts.teacher.modules() if method.parts.teacher is not None else [])]
    return any(p.dtype in (torch.float16, torch.bfloat16) for m in parts for p in m.parameters())
