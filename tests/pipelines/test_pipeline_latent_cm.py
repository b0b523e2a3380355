"""Exports of the iCT family draw our sampler's pictures in a process without this package, in latents and in pixels."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.diffusion.generator import seeded
from fewstep.pipelines.pipeline_latent_cm import LatentCMPipeline
from torch import Tensor

from ..methods.ict_parts import CLASSES, LATENT, latent_ict, latent_teacher
from .conftest import LABELS, PROMPTS, Opened

PIXELS = ["grey", "classes"]
LATENTS = ["latent scratch", "latent ect", "latent cd"]


def ours(opened: Opened, name: str, num_steps: int) -> np.ndarray:
    """(2, H, W, C) in [0, 1] by the method's own sampler and decoder."""
    method = opened.methods[name]
    captions = PROMPTS if name in LATENTS else [CLASSES[i] for i in LABELS]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    with torch.no_grad():
        pictures = method.space.decode(method.sample(captions, num_steps, generators))
    return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", PIXELS + LATENTS)
def test_plain_diffusers_draws_our_pictures(name: str, num_steps: int, opened: Opened) -> None:
    theirs, pictures = opened.images[f"{name} {num_steps}"], ours(opened, name, num_steps)
    assert theirs.shape[-1] == (1 if name == "grey" else 3)
    assert np.abs(theirs - pictures).max() < 1e-5
    assert pictures.std() > 0.01 and np.abs(pictures[0] - pictures[1]).max() > 0.01
    inside = (pictures > 0) & (pictures < 1)
    assert inside.mean() > 0.8  # few are equal by being cut


@pytest.mark.parametrize("name", PIXELS + LATENTS)
def test_two_steps_are_other_pictures_than_one(name: str, opened: Opened) -> None:
    assert np.abs(opened.images[f"{name} 1"] - opened.images[f"{name} 2"]).max() > 1e-3


def test_folders_open_as_what_the_readme_says(opened: Opened) -> None:
    for name in PIXELS:
        assert str(opened.images[f"{name} 1 class"]) == "ConsistencyModelPipeline"
        assert not list(opened.folders[name].glob("*.py"))
    for name in LATENTS:
        folder = opened.folders[name]
        assert str(opened.images[f"{name} 1 class"]) == "LatentCMPipeline"
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_latent_cm", "LatentCMPipeline"]
        assert (index["noise_schedule"] == [None, None]) == (name == "latent scratch")
        source = (folder / "pipeline_latent_cm.py").read_text()
        assert set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)) == {
            "typing", "torch", "diffusers", "transformers",
        }  # fmt: skip


def test_exported_files_name_no_path_and_the_two_step_level(opened: Opened) -> None:
    for name in PIXELS + LATENTS:
        files = [p for p in opened.folders[name].rglob("*") if p.is_file()]
        assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".py"}
        for path in opened.folders[name].rglob("*.json"):
            assert not re.search(r'"(/|~|[A-Z]:\\)[^"<]', path.read_text()), path
        calls = json.loads((opened.folders[name] / "sampling.json").read_text())
        assert calls == opened.methods[name].calls() and list(calls) == ["1", "2"]


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> LatentCMPipeline:
    model = latent_ict(tiny_pipeline).eval().export().model
    model.set_progress_bar_config(disable=True)
    return model


def test_prompts_are_encoded_as_the_teacher_encodes_them(
    pipeline: LatentCMPipeline, tiny_pipeline: Path
) -> None:
    prompts = ["red cat", "", "a red red dog " * 9]
    states = pipeline.encode(prompts, torch.device("cpu"))
    expected = latent_teacher(tiny_pipeline).encode_prompts(prompts)["encoder_hidden_states"]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
    assert states.shape == (3, 12, 16)


def test_steps_are_even_without_timesteps_and_a_single_prompt_is_one_picture(
    pipeline: LatentCMPipeline,
) -> None:
    """diffusers' two even steps of 1281 are 0 and 640 of its levels."""
    images = pipeline("dog", 2, generator=seeded(1, 3), output_type="latent").images
    chosen = pipeline(
        "dog", timesteps=[640, 0], generator=seeded(1, 3), output_type="latent", return_dict=False
    )
    assert images.shape == (1, 4, 8, 8) and torch.equal(images, chosen[0])
    other = pipeline("red cat", 2, generator=seeded(1, 3), output_type="latent").images
    assert (images - other).norm() > 1e-3 * images.norm()
    assert pipeline("dog", generator=seeded(1, 3)).images[0].size == (16, 16)


def test_latents_are_scaled_as_stable_diffusion_scales_them(pipeline: LatentCMPipeline) -> None:
    """By scaling_factor alone: StableDiffusionPipeline does not read shift_factor."""
    pipeline.register_modules(vae=copy.deepcopy(pipeline.vae))  # it is the teacher's
    pipeline.vae.register_to_config(shift_factor=0.3, scaling_factor=0.5)
    latents = pipeline("dog", generator=seeded(1, 3), output_type="latent").images
    with torch.no_grad():
        expected = (pipeline.vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    images: Tensor = pipeline("dog", generator=seeded(1, 3), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_levels_beyond_the_schedule_are_cut_as_the_view_cuts_them(kind: str, tiny_pipeline: Path) -> None:
    """F of c_skip x + c_out F is that of the view's x0, at any level."""
    method = latent_ict(tiny_pipeline, prediction=kind).eval()
    pipeline = method.export().model
    x = torch.randn(1, 4, 8, 8)
    condition = method.space.condition(["dog"])
    states, sd = condition.arguments["encoder_hidden_states"], LATENT["sigma_data"]
    for level in (0.001, 0.02917, 0.3, 0.99, 1.01, 7.0, 14.6, 90.0):
        sigma = torch.tensor([level], dtype=torch.float64)
        with torch.no_grad():
            output = pipeline.preconditioned(level * x, sigma[0], states)
            x0 = method.function.denoiser(level * x, sigma, condition).x0
        rebuilt = sd**2 / (level**2 + sd**2) * level * x + level * sd / (level**2 + sd**2) ** 0.5 * output
        assert ((rebuilt - x0).norm() / x0.norm()).item() < 2e-5, level
