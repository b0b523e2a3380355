"""Latents in the units of every pipeline class: what each decodes, whatever its autoencoder's configuration names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.errors import UserError
from fewstep.distill.methods.space import space_of
from fewstep.distill.models.student import new_denoiser
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from fewstep.pipelines.pipeline_latent_cm import LatentCMPipeline
from fewstep.pipelines.pipeline_latent_meanflow import LatentMeanFlowPipeline

from ..tiny_families import BUILDERS, SIDE
from .test_families import CALLS, PROMPT, load, spread

UNITS = {
    "scaling_factor": 0.5,
    "shift_factor": 0.3,
    "latents_mean": [1.0, -2.0, 3.0, 0.5],
    "latents_std": [0.1, 0.7, 2.0, 1.5],
}


@pytest.fixture(scope="module")
def changed(
    tiny_pipeline: Path,
    lcm_pipeline: Path,
    tiny_families: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """A family's folder whose autoencoder has every key that any pipeline reads."""

    def build(name: str, **units: Any) -> Path:
        source = {"sd": tiny_pipeline, "lcm": lcm_pipeline}.get(name) or tiny_families(name)
        folder = shutil.copytree(source, tmp_path_factory.mktemp("units") / name)
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **UNITS, **units}))
        return folder

    return build


@pytest.mark.parametrize(
    ("name", "less"),
    [
        *((name, {}) for name in ("sd", "lcm", *BUILDERS)),
        ("sdxl", {"latents_std": None}),
        ("sd3", {"latents_mean": None}),
    ],
)
def test_decoded_as_the_stock_pipeline_does(
    name: str, less: dict[str, Any], changed: Callable[..., Path]
) -> None:
    """And back: `scaled` is the inverse of `unscaled`."""
    folder = changed(name, **less)
    pipeline = DiffusionPipeline.from_pretrained(
        folder, **({"safety_checker": None} if name in ("sd", "lcm") else {})
    )
    pipeline.set_progress_bar_config(disable=True)
    call = {**CALLS.get(name, {}), "num_inference_steps": 1}

    def drawn(output_type: str) -> Any:
        return pipeline(PROMPT, output_type=output_type, generator=torch.Generator().manual_seed(3), **call)[
            0
        ]

    teacher = load(folder)
    with torch.no_grad():
        ours = (teacher.decode(spread(name, drawn("latent"))) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    picture = np.asarray(drawn("np")).reshape(1, SIDE, SIDE, 3)
    assert picture.std() > 1e-3 and np.abs(ours.numpy() - picture).max() < 1e-5
    z = torch.randn(2, *teacher.shape)
    assert torch.allclose(teacher.scaled(teacher.unscaled(z)), z, atol=1e-5)


def test_our_pipelines_decode_as_their_teacher(changed: Callable[..., Path]) -> None:
    teacher = load(changed("sd"))
    parts = {k: getattr(teacher.pipeline, k) for k in ("unet", "vae", "text_encoder", "tokenizer")}
    noise = teacher.pipeline.scheduler
    levels = CMStochasticIterativeScheduler(sigma_min=0.03, sigma_max=14.0)
    flow = FlowMatchEulerDiscreteScheduler()
    for pipeline in (
        LatentCMPipeline(**parts, scheduler=levels, noise_schedule=noise),
        LatentMeanFlowPipeline(**parts, scheduler=flow, noise_schedule=noise, t_max=0.9),
    ):
        if isinstance(pipeline, LatentMeanFlowPipeline):
            pipeline.network = lambda x, t, span, states: x  # type: ignore[method-assign]
        pipeline.set_progress_bar_config(disable=True)

        def drawn(output_type: str, pipeline: Any = pipeline) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipeline(PROMPT, generator=generator, output_type=output_type).images

        with torch.no_grad():
            ours = (teacher.decode(drawn("latent")) / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(ours, drawn("pt"), atol=1e-5)


def test_units_that_a_pipeline_of_ours_does_not_know(changed: Callable[..., Path]) -> None:
    """A class-conditional network in the latents of a teacher whose class has a rule of its own."""
    tiny = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (4,), "layers_per_block": 1,
            "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2}  # fmt: skip
    network = new_denoiser({**tiny, "add_attention": False}, EDM(), "edm").network
    for name, fits in (("sd", False), ("sdxl", False), ("sd3", True)):
        parts = Parts(load(changed(name)), StudentSettings(), [], (), SIDE)
        if fits:
            assert space_of(network, parts).shape == (4, 8, 8)
        else:
            with pytest.raises(UserError, match=r"teacher\.path: .*scales latents by another rule"):
                space_of(network, parts)
