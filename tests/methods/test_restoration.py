"""Restoration from an intermediate state: the schedule, its start, LCM's own image-to-image, fidelity."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelImg2ImgPipeline
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction, no_boundary
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.generator import fresh_from, seeded
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.restorer import Restorer
from fewstep.distill.models.one_step import controlnet_of
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import TeacherSettings
from torch import Tensor, nn

ABAR = {999: 0.00466, 759: 0.052213, 499: 0.277669, 259: 0.658975}


def restorer(folder: Path, num_steps: int = 4, **options: Any) -> Restorer:
    teacher = Teacher.load(TeacherSettings(str(folder)))
    assert isinstance(teacher, LatentTeacher)
    return Restorer(teacher, num_steps, **options)


def test_schedules(tiny_pipeline: Path) -> None:
    """Spec, section 2: "3-step" runs the network at 759, 499, 259, "1-step" at 499."""
    four, two = restorer(tiny_pipeline), restorer(tiny_pipeline, 2)
    assert four.timesteps == [999, 759, 499, 259] and two.timesteps == [999, 499]
    t = torch.tensor(list(ABAR), dtype=torch.float64)
    abar = four.teacher.noise.alpha(t).square()
    assert abar[1:].tolist() == pytest.approx(list(ABAR.values())[1:], abs=1e-6)
    assert abar[0].item() == pytest.approx(0.00466, abs=5e-6)  # given to five digits
    assert restorer(tiny_pipeline, timesteps=[800, 30]).timesteps == [800, 30]


def test_the_state_of_the_first_step_that_runs(tiny_pipeline: Path) -> None:
    z, noise = torch.full((2, 4, 8, 8), 0.5), torch.ones(2, 4, 8, 8)
    three, one = restorer(tiny_pipeline).start(z, noise, 1), restorer(tiny_pipeline, 2).start(z, noise, 1)
    torch.testing.assert_close(three, torch.full_like(z, 1.0877943), rtol=0, atol=1e-6)
    torch.testing.assert_close(one, torch.full_like(z, 1.1133721), rtol=0, atol=1e-6)


def test_the_schedule_is_that_of_the_students_own_call(lcm_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "pipeline"
    folder.parent.mkdir()
    folder.symlink_to(lcm_pipeline)
    assert restorer(tmp_path / "run").guidance_scale == 8.5
    folder.unlink()
    shutil.copytree(lcm_pipeline, folder)
    (folder / "sampling.json").write_text('{"3": {"timesteps": [999, 459, 119], "guidance_scale": 3.0}}')
    own = restorer(tmp_path / "run", 3)
    assert own.timesteps == [999, 459, 119] and own.guidance_scale == 3
    assert own.call(2) == {"timesteps": [999, 459, 119], "start_index": 2, "guidance_scale": 3.0}
    assert restorer(tmp_path / "run", 4).timesteps == [999, 759, 499, 259]
    assert restorer(tmp_path / "run", 3, guidance_scale=5.0).guidance_scale == 5


@pytest.mark.parametrize("shift", [None, 0.3])
def test_the_latent_is_the_posteriors_mean(shift: float | None, tiny_pipeline: Path) -> None:
    """Stable Diffusion's pipelines do not read shift_factor."""
    one, images = restorer(tiny_pipeline), torch.rand(2, 3, 16, 16) * 2 - 1
    vae = one.teacher.vae
    vae.register_to_config(shift_factor=shift)
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(one.latents(images), 0.18215 * mean)
    assert not one.latents(images.requires_grad_(True)).requires_grad


@pytest.mark.parametrize("start", [1, 2])
def test_untrained_it_is_lcms_image_to_image(start: int, lcm_pipeline: Path) -> None:
    """With a ControlNet that starts at zero, a fixed condition, the same start and the same noises."""
    one = restorer(lcm_pipeline, guidance_scale=8.0)
    teacher, z = one.teacher, 0.5 * torch.randn(2, 4, 8, 8)
    states = torch.randn(2, 12, 16)
    told, picture = Condition({"encoder_hidden_states": states}, {}), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        plain = one(z, told, fresh_from(seeded(2, 3)), start)
        steered = one(z, told, fresh_from(seeded(2, 3)), start, controlnet_of(teacher), picture)
    parts = {k: v for k, v in teacher.pipeline.components.items() if k != "image_encoder"}
    stock = LatentConsistencyModelImg2ImgPipeline(
        **{**parts, "scheduler": one.scheduler}, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    made = stock(
        prompt_embeds=states, image=z, timesteps=one.timesteps, strength=1 - start / 4, guidance_scale=8.0,
        generator=seeded(2, 3), output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(plain, steered)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    other = Restorer(teacher, guidance_scale=3.0)
    with torch.no_grad():
        assert (other(z, told, fresh_from(seeded(2, 3)), start) - plain).abs().max() > 1e-3


class Shrinking(Denoiser):
    """The posterior mean of x0 ~ N(0, I): alpha x_t."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (self.process.alpha(t).to(x_t.dtype).view(-1, 1, 1, 1) * x_t,), {}


class Itself(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def test_a_later_start_is_closer_to_the_picture(tiny_pipeline: Path) -> None:
    """And the first state is of the mean that the formula gives, for data whose denoiser is known."""
    one, z = restorer(tiny_pipeline), torch.randn(256, 4, 8, 8)
    one.function = ConsistencyFunction(Shrinking(Itself(), one.teacher.noise, "sample"), no_boundary)
    told = Condition({"encoder_hidden_states": torch.zeros(256, 12, 16)}, {})
    a = one.teacher.noise.alpha(torch.tensor([float(t) for t in one.timesteps]))
    apart = []
    for start in (1, 2, 3):
        out = one(z, told, lambda x: torch.randn_like(x), start)
        kept = (
            (out * z).sum() / z.square().sum()
        ).item()  # each step multiplies what is left of z by alpha^2
        assert kept == pytest.approx(a[start:].square().prod().item(), abs=0.02)
        apart.append((out - z).square().mean().item())
    assert apart[0] > apart[1] > apart[2]


def test_what_does_not_fit_is_refused(tiny_pipeline: Path, tiny_families: Any) -> None:
    with pytest.raises(UserError, match=r"method.timesteps: \[499, 999\] are not two or more falling"):
        restorer(tiny_pipeline, timesteps=[499, 999])
    with pytest.raises(UserError, match=r"method.timesteps: \[999\]"):
        restorer(tiny_pipeline, timesteps=[999])
    with pytest.raises(UserError, match=r"method.timesteps: \[1000, 5\]"):
        restorer(tiny_pipeline, timesteps=[1000, 5])
    with pytest.raises(UserError, match=r"method.guidance_scale: the generator has no embedding"):
        restorer(tiny_pipeline, guidance_scale=3.0)
    for start in (0, 4):
        with pytest.raises(UserError, match=rf"method.start_index: {start} is not in 1..3"):
            restorer(tiny_pipeline).check(start)
    restorer(tiny_pipeline).check(3)
    with pytest.raises(UserError, match=r"rectified flow"):
        restorer(tiny_families("flux"))


def test_sdxl_restores_too(tiny_families: Any) -> None:
    one = restorer(tiny_families("sdxl"))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        out = one(one.latents(images), one.teacher.condition(["", ""]), fresh_from(seeded(2, 0)), 1)
    assert out.shape == (2, *one.teacher.shape) and out.isfinite().all()
