"""Exports of latent consistency training draw our sampler's pictures in a process without this package."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.reports.remote_code import may_run
from fewstep.distill.training.card_code import loading_lines
from fewstep.pipelines.export import FOLDER, own_parts
from fewstep.pipelines.pipeline_class_latent_cm import ClassLatentCMPipeline

from ..methods.ict_parts import CLASSES
from ..methods.lct_parts import CLASSED, lct
from .conftest import LABELS, PROMPTS, Opened

FILES = {
    "latent lct": {"pipeline_latent_cm.py", "unet/unet_norms.py", "statistics/latent_statistics.py"},
    "plain lct": {"pipeline_class_latent_cm.py"},
    "lct classes": {"pipeline_class_latent_cm.py", "unet/unet_norms.py", "statistics/latent_statistics.py"},
    "dit lct classes": {
        "pipeline_class_latent_cm.py", "unet/transformer_two_time.py", "statistics/latent_statistics.py",
    },
    "normed grey": {"unet/unet_norms.py"},
}  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_plain_diffusers_draws_our_pictures(name: str, num_steps: int, opened: Opened) -> None:
    method, theirs = opened.methods[name], opened.images[f"{name} {num_steps}"]
    captions = PROMPTS if name == "latent lct" else [CLASSES[i] for i in LABELS]
    with torch.no_grad():
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
        pictures = method.space.decode(method.sample(captions, num_steps, generators))
    pictures = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(theirs - pictures).max() < 2e-5
    assert pictures.std() > 0.01 and np.abs(pictures[0] - pictures[1]).max() > 0.01
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.5
    assert np.abs(opened.images[f"{name} 1"] - opened.images[f"{name} 2"]).max() > 1e-3


@pytest.mark.parametrize("name", FILES)
def test_folders_hold_one_file_of_code_for_each_class_of_ours(name: str, opened: Opened) -> None:
    """Byte for byte, so that `evaluate` runs them unasked; they import nothing but torch and diffusers."""
    folder = opened.folders[name]
    found = {str(p.relative_to(folder)) for p in folder.rglob("*.py")}
    assert found == FILES[name]
    for path in found:
        source = (folder / path).read_bytes()
        assert source == (FOLDER / Path(path).name).read_bytes()
        modules = set(re.findall(r"^(?:from|import) (\w+)", source.decode(), re.MULTILINE))
        assert modules <= {"typing", "collections", "inspect", "torch", "diffusers", "transformers"}
    assert may_run(folder, trust_remote_code=False)
    index = json.loads((folder / "model_index.json").read_text())
    assert ("statistics" in index and index["statistics"][0] == "latent_statistics") == (
        "statistics/latent_statistics.py" in found
    )
    for path in folder.rglob("*.json"):
        assert not re.search(r'"(/|~|[A-Z]:\\)[^"<]', path.read_text()), path
    calls = json.loads((folder / "sampling.json").read_text())
    assert calls["2"] == {"timesteps": [788 if name == "normed grey" else 440, 0]}


def test_the_card_says_that_code_is_needed(opened: Opened) -> None:
    for name in FILES:
        assert "trust_remote_code=True" in loading_lines(opened.methods[name].export())
    assert "trust_remote_code" not in loading_lines(opened.methods["grey"].export())
    assert own_parts(opened.methods["grey"].export().model) == {}


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> ClassLatentCMPipeline:
    model = lct(tiny_pipeline, network=CLASSED).eval().export().model
    model.set_progress_bar_config(disable=True)
    return model


def test_labels_are_checked_and_drawn_where_there_are_none(pipeline: ClassLatentCMPipeline) -> None:
    call = {"batch_size": 2, "output_type": "latent"}
    drawn = pipeline(**call, generator=seeded(2, 3)).images
    assert torch.equal(drawn, pipeline(**call, generator=seeded(2, 3), return_dict=False)[0])
    generators = seeded(2, 3)
    for g in generators:
        torch.randn(4, 8, 8, generator=g)
    labels = [int(torch.randint(3, (1,), generator=g)) for g in generators]
    told = pipeline(**call, class_labels=labels, generator=seeded(2, 3)).images
    torch.testing.assert_close(told, drawn)
    other = [(label + 1) % 3 for label in labels]
    assert not torch.allclose(pipeline(**call, class_labels=other, generator=seeded(2, 3)).images, drawn)
    with pytest.raises(ValueError, match="class_labels: 3 given for a batch of 2"):
        pipeline(**call, class_labels=[0, 1, 2])
    images = pipeline(class_labels=1, num_inference_steps=2, generator=seeded(1, 3)).images
    assert images[0].size == (16, 16)
    even = pipeline(
        class_labels=1, num_inference_steps=2, generator=seeded(1, 3), output_type="latent"
    ).images
    chosen = pipeline(class_labels=1, timesteps=[320, 0], generator=seeded(1, 3), output_type="latent").images
    assert torch.equal(even, chosen)


def test_labels_of_an_unconditional_network_are_refused(tiny_pipeline: Path) -> None:
    model = lct(tiny_pipeline).eval().export().model
    with pytest.raises(ValueError, match="this network is unconditional"):
        model(class_labels=0)


def test_latents_are_restored_scaled_and_shifted_before_they_are_decoded(
    pipeline: ClassLatentCMPipeline,
) -> None:
    pipeline.register_modules(vae=copy.deepcopy(pipeline.vae))
    pipeline.vae.register_to_config(shift_factor=0.3, scaling_factor=0.5)
    call = {"class_labels": 1, "timesteps": [440, 0]}
    latents = pipeline(**call, generator=seeded(1, 3), output_type="latent").images
    kept = pipeline.statistics
    z = latents * kept.std / 0.5 + kept.mean
    with torch.no_grad():
        expected = (pipeline.vae.decode(z / 0.5 + 0.3).sample / 2 + 0.5).clamp(0, 1)
    images = pipeline(**call, generator=seeded(1, 3), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert kept.std.std() > 0.1 * kept.std.mean()
