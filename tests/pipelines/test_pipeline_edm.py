"""Heun's sampler against a plain float64 loop, its evaluations, labels, outputs and its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.errors import UserError
from fewstep.distill.models.teacher import PixelTeacher, Teacher
from fewstep.distill.settings import TeacherSettings
from fewstep.pipelines.pipeline_edm import EDMPipeline
from torch import Tensor

from ..methods.ict_parts import COLOUR, GREY, pixel_teacher
from .conftest import LABELS, Opened

LOW, HIGH, SD, RHO = 0.01, 50.0, 0.4, 5.0


def pipeline_of(network: dict = GREY) -> EDMPipeline:
    pipeline = pixel_teacher(network, sigma_min=LOW, sigma_max=HIGH, sigma_data=SD, rho=RHO).pipeline
    pipeline.unet.double()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoised(pipeline: EDMPipeline, x: Tensor, s: float, labels: Tensor | None = None) -> Tensor:
    """D(x, s) of table 1."""
    norm = (s**2 + SD**2) ** 0.5
    time = torch.full((len(x),), 250 * np.log(s)).float()
    with torch.no_grad():
        output = pipeline.unet(x / norm, time, class_labels=labels).sample
    return SD**2 / norm**2 * x + s * SD / norm * output


def noise(rows: int, channels: int = 1) -> Tensor:
    return torch.cat(
        [torch.randn(1, channels, 8, 8, generator=g, dtype=torch.float64) for g in seeded(rows, 3)]
    )


def plain_heun(pipeline: EDMPipeline, z: Tensor, n: int, labels: Tensor | None = None) -> Tensor:
    """Algorithm 1 without its churn: t_i of eq. 5 for i < n, then 0."""
    t = [(HIGH ** (1 / RHO) + i / (n - 1) * (LOW ** (1 / RHO) - HIGH ** (1 / RHO))) ** RHO for i in range(n)]
    x = t[0] * z
    for i in range(n):
        following = t[i + 1] if i + 1 < n else 0.0
        d = (x - denoised(pipeline, x, t[i], labels)) / t[i]
        moved = x + (following - t[i]) * d
        if following != 0:
            e = (moved - denoised(pipeline, moved, following, labels)) / following
            moved = x + (following - t[i]) * (d / 2 + e / 2)
        x = moved
    return x


def images(x: Tensor) -> np.ndarray:
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_sampling_is_algorithm_1(num_steps: int) -> None:
    pipeline = pipeline_of()
    ours = pipeline(3, None, num_steps, generator=seeded(3, 3), output_type="latent").images
    expected = plain_heun(pipeline, noise(3), num_steps)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert ((ours[0] - ours[1]).norm() / ours[0].norm()).item() > 0.01


def test_one_step_is_the_denoiser_at_sigma_max() -> None:
    pipeline = pipeline_of()
    ours = pipeline(2, None, 1, generator=seeded(2, 3), output_type="latent").images
    expected = denoised(pipeline, HIGH * noise(2), HIGH)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_n_steps_take_2n_minus_1_evaluations_at_the_levels_of_the_grid(num_steps: int) -> None:
    pipeline = pipeline_of()
    times: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1][0].item()))
    pipeline(1, None, num_steps, generator=seeded(1, 3), output_type="latent")
    grid = [HIGH] if num_steps == 1 else EDM(LOW, HIGH, SD, RHO).grid(num_steps).flip(0).tolist()
    seen = [s for level in grid[1:] for s in (level, level)]
    assert len(times) == 2 * num_steps - 1
    assert times == pytest.approx([250 * np.log(s) for s in [grid[0], *seen]], rel=1e-6)
    assert pipeline.sigmas(num_steps) == pytest.approx([*grid, 0.0], rel=1e-12)


def test_labels_reach_the_network_as_a_number_a_list_or_a_tensor() -> None:
    pipeline = pipeline_of({**COLOUR, "num_class_embeds": 3})
    expected = plain_heun(pipeline, noise(2, 3), 3, torch.tensor(LABELS))
    for labels in (LABELS, torch.tensor(LABELS)):
        ours = pipeline(2, labels, 3, generator=seeded(2, 3), output_type="latent").images
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    single = pipeline(1, 0, 3, generator=seeded(1, 3), output_type="latent").images
    torch.testing.assert_close(single, expected[:1], rtol=1e-9, atol=1e-9)
    assert (expected[1] - plain_heun(pipeline, noise(2, 3), 3, torch.tensor([0, 0]))[1]).abs().max() > 1e-3


def test_labels_that_are_left_out_are_drawn_from_all_classes() -> None:
    pipeline = pipeline_of({**COLOUR, "num_class_embeds": 3})
    seen: list[int] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipeline(30, None, 1, output_type="latent")
    assert len(seen) == 30 and set(seen) == {0, 1, 2}


def test_labels_that_do_not_fit_are_refused() -> None:
    pipeline = pipeline_of({**COLOUR, "num_class_embeds": 3})
    for batch_size, labels in ((2, [0, 1, 2]), (3, 1), (1, torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=rf"class_labels: \d given for a batch of {batch_size}"):
            pipeline(batch_size, labels, 1)
    with pytest.raises(ValueError, match="class_labels: this network is unconditional; leave them out"):
        pipeline_of()(1, [0], 1)
    with pytest.raises(ValueError, match="num_inference_steps 0: give 1 or more"):
        pipeline_of()(1, None, 0)


def test_pictures_are_in_the_usual_ranges_and_belong_to_their_generator() -> None:
    pipeline = pipeline_of()
    x = plain_heun(pipeline, noise(2), 3)
    call = {"num_inference_steps": 3}
    array = pipeline(2, **call, generator=seeded(2, 3), output_type="np").images
    np.testing.assert_allclose(array, images(x), rtol=0, atol=1e-7)
    (alone,) = pipeline(1, **call, generator=seeded(1, 4), output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(alone, (x[1] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-9)
    picture = pipeline(1, **call, generator=seeded(1, 3)).images[0]
    assert picture.mode == "L" and picture.size == (8, 8)
    assert np.abs(np.asarray(picture) - 255 * images(x)[0, :, :, 0]).max() <= 0.51
    assert pipeline_of(COLOUR)(1, **call).images[0].mode == "RGB"


@pytest.mark.parametrize("name", ["edm", "edm classes"])
def test_plain_diffusers_draws_our_pictures(name: str, opened: Opened) -> None:
    labels = LABELS if name.endswith("classes") else None
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    pictures = opened.methods[name](2, labels, 3, generator=generators, output_type="np").images
    assert str(opened.images[f"{name} 3 class"]) == "EDMPipeline"
    assert np.abs(opened.images[f"{name} 3"] - pictures).max() < 1e-5 and pictures.std() > 0.01
    index = json.loads((opened.folders[name] / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_edm", "EDMPipeline"]


def test_a_folder_is_a_teacher_of_pixels_with_its_own_process(opened: Opened) -> None:
    teacher = Teacher.load(TeacherSettings(path=str(opened.folders["edm"])))
    assert isinstance(teacher, PixelTeacher) and teacher.shape == (1, 8, 8) and teacher.resolution == 8
    assert isinstance(teacher.process, EDM) and teacher.process.t_range == (0.01, 80.0)
    assert (teacher.process.sigma_data, teacher.process.rho, teacher.denoiser.kind) == (0.4, 5.0, "edm")
    network = opened.methods["edm"].unet.state_dict()
    assert all(torch.equal(v, network[k]) for k, v in teacher.denoiser.network.state_dict().items())


def test_a_folder_with_a_part_missing_is_refused_in_one_line(opened: Opened, tmp_path: Path) -> None:
    for part, message in (
        ("scheduler", "has no scheduler; save the pipeline"),
        ("unet", "is not a readable"),
    ):
        folder = tmp_path / part
        shutil.copytree(opened.folders["edm"], folder)
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=message) as caught:
            Teacher.load(TeacherSettings(path=str(folder)))
        assert "\n" not in str(caught.value)
