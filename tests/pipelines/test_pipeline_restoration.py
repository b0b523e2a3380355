"""RestorationPipeline in memory: against our own rollout, its defaults, colours, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.diffusion.generator import fresh_from, seeded
from fewstep.distill.methods.restoration.restorer import Restorer
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.settings import TeacherSettings
from fewstep.pipelines.pipeline_restoration import (
    RestorationPipeline,
    colour_fixed,
    image_tokens,
    low_frequencies,
)
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, TimmWrapperConfig, TimmWrapperModel

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def student(folder: Path, **options: Any) -> tuple[Restorer, RestorationPipeline]:
    """A student without trained parts, as our own rollout and as a pipeline."""
    one = Restorer(Teacher.load(TeacherSettings(str(folder))), **options)
    old = one.teacher.pipeline
    pipe = RestorationPipeline(
        old.unet,
        old.vae,
        one.scheduler,
        text_encoder=old.text_encoder,
        tokenizer=old.tokenizer,
        **one.call(1),
    )
    pipe.set_progress_bar_config(disable=True)
    return one, pipe


@pytest.mark.parametrize("family", ["sd", "lcm"])
@pytest.mark.parametrize("start", [1, 3])
def test_a_student_alone(family: str, start: int, tiny_pipeline: Path, lcm_pipeline: Path) -> None:
    scale = {"guidance_scale": 3.0} if family == "lcm" else {}
    one, pipe = student(lcm_pipeline if family == "lcm" else tiny_pipeline, **scale)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(args[1].flatten()[0].item()))
    for captions in (["", ""], ["red cat", "dog"]):
        told = one.teacher.condition(captions)
        with torch.no_grad():
            ours = one(one.latents(2 * PICTURES - 1), told, fresh_from(seeded(2, 5)), start)
            expected = (one.teacher.decode(ours) / 2 + 0.5).clamp(0, 1)
        calls.clear()
        arguments = {"prompt": captions} if any(captions) else {}
        made = pipe(PICTURES, generator=seeded(2, 5), output_type="pt", start_index=start, **arguments).images
        assert calls == [999, 759, 499, 259][start:]
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
        latent = pipe(PICTURES, generator=seeded(2, 5), output_type="latent", start_index=start, **arguments)
        torch.testing.assert_close(latent.images, ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item())


def test_latents_with_a_shift(tiny_pipeline: Path) -> None:
    one, pipe = student(tiny_pipeline)
    one.teacher.vae.register_to_config(shift_factor=0.3)
    with torch.no_grad():
        told = one.teacher.condition(["", ""])
        ours = one.teacher.decode(one(one.latents(2 * PICTURES - 1), told, fresh_from(seeded(2, 5)), 3))
    made = pipe(PICTURES, generator=seeded(2, 5), output_type="pt", start_index=3).images
    torch.testing.assert_close(made, (ours / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_a_call_changes_the_defaults(lcm_pipeline: Path) -> None:
    one, pipe = student(lcm_pipeline, guidance_scale=3.0)
    other = Restorer(one.teacher, timesteps=[999, 499, 99], guidance_scale=6.0)
    with torch.no_grad():
        told = one.teacher.condition(["", ""])
        ours = other(other.latents(2 * PICTURES - 1), told, fresh_from(seeded(2, 5)), 2)
    made = pipe(PICTURES, generator=seeded(2, 5), output_type="latent", **other.call(2)).images
    torch.testing.assert_close(made, ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item())
    assert [pipe.config[k] for k in ("timesteps", "start_index", "guidance_scale")] == [
        [999, 759, 499, 259], 1, 3.0,
    ]  # fmt: skip


def test_pictures_of_any_size_and_one_of_them(tiny_pipeline: Path) -> None:
    _, pipe = student(tiny_pipeline)
    made = pipe(Image.new("RGB", (40, 30), "red"), generator=torch.Generator().manual_seed(0)).images
    assert len(made) == 1 and made[0].size == (16, 16)


def test_what_it_refuses(tiny_pipeline: Path) -> None:
    _, pipe = student(tiny_pipeline)
    for start in (0, 4):
        with pytest.raises(ValueError, match=rf"start_index {start} is not in 1..3"):
            pipe(PICTURES, start_index=start)
    with pytest.raises(ValueError, match=r"colour_fix 'hue' is not none, wavelet or adain"):
        pipe(PICTURES, colour_fix="hue")


def test_wavelet_fix() -> None:
    """The output's details on the picture's low frequencies."""
    output, seen = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    fixed = colour_fixed(output, seen, "wavelet")
    torch.testing.assert_close(fixed - low_frequencies(seen), output - low_frequencies(output))
    torch.testing.assert_close(colour_fixed(output, output, "wavelet"), output, rtol=1e-4, atol=1e-5)
    shifted = colour_fixed(output + 0.7, output, "wavelet")
    torch.testing.assert_close(shifted, output, rtol=1e-4, atol=1e-4)
    assert torch.equal(colour_fixed(output, seen, "none"), output)


def test_low_frequencies_by_hand() -> None:
    """Five blurs [1, 2, 1] / 4 along both axes at distances 1, 2, 4, 8, 16: on a point, their product."""
    point = torch.zeros(1, 1, 96, 96)
    point[..., 48, 48] = 1
    line = torch.zeros(96)
    line[48] = 1
    for d in (1, 2, 4, 8, 16):
        line = 0.25 * line.roll(d) + 0.5 * line + 0.25 * line.roll(-d)
    torch.testing.assert_close(low_frequencies(point)[0, 0], line[:, None] * line)
    torch.testing.assert_close(low_frequencies(torch.full((1, 3, 8, 8), 0.3)), torch.full((1, 3, 8, 8), 0.3))


def test_adain_fix() -> None:
    output, seen = 3 * torch.randn(2, 3, 8, 8) + 1, torch.randn(2, 3, 8, 8) - 2
    fixed = colour_fixed(output, seen, "adain")
    torch.testing.assert_close(fixed.mean((2, 3)), seen.mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fixed.std((2, 3)), seen.std((2, 3)), rtol=1e-3, atol=1e-3)


def test_clips_tokens_are_all_of_them_after_its_last_norm() -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
        image_size=8,
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    with torch.no_grad():
        found = image_tokens(tower, 2 * PICTURES - 1, 8, mean, std)
        x = F.interpolate(PICTURES, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        out = tower(x)
    assert found.shape == (2, 5, 16)
    torch.testing.assert_close(found[:, 0], out.pooler_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)


def test_a_convolutional_networks_tokens_are_its_places() -> None:
    network = TimmWrapperModel(
        TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False)
    ).eval()
    with torch.no_grad():
        found = image_tokens(network, 2 * PICTURES - 1, 64, (0.5,) * 3, (0.5,) * 3)
        x = F.interpolate(PICTURES, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
        features = network.timm_model.forward_features(2 * x - 1)
    assert found.shape == (2, 4, 1280)
    torch.testing.assert_close(found[:, 3], features[:, :, 1, 1], rtol=1e-4, atol=1e-5)
