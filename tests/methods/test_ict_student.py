"""The student of consistency training on pixels: its start, dropout, samples, export, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers import ConsistencyModelPipeline, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from fewstep.distill.config.validation import validate
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import DenoiserView
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.errors import UserError
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.consistency_training.settings import ICTSettings
from fewstep.distill.models.student import set_dropout
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from torch import Tensor, nn

from ..rounding import rounding
from .ict_parts import (
    CLASSES,
    COLOUR,
    GREY,
    copied,
    edm_denoiser,
    pixel_batch,
    pixel_ict,
    pixel_teacher,
    shaken,
    step,
)

CLASSED = {**COLOUR, "num_class_embeds": len(CLASSES)}


def built(student: dict[str, Any], **settings: Any) -> ICT:
    return ICT(ICTSettings(**settings), Parts(pixel_teacher(), StudentSettings(**student), [], (), 8))


def same_config(a: UNet2DModel, b: UNet2DModel) -> bool:
    def of(network: UNet2DModel) -> dict[str, Any]:
        return {k: v for k, v in network.config.items() if not k.startswith("_")}

    return of(a) == of(b) and len(of(a)) > 20


def test_a_student_starts_as_the_teacher_or_from_new_weights_of_the_same_architecture() -> None:
    teacher, scratch = built({}), built({"init": "scratch"})
    original = teacher.parts.need_teacher().denoiser.network
    assert isinstance(original, UNet2DModel) and teacher.student.network is not original
    ours, new = teacher.student.network.state_dict(), scratch.student.network.state_dict()
    for name, weight in original.state_dict().items():
        assert torch.equal(ours[name], weight) and new[name].shape == weight.shape
    matrices = [k for k, w in ours.items() if w.ndim > 1]
    assert len(matrices) > 10 and not any(torch.equal(new[k], ours[k]) for k in matrices)
    assert same_config(scratch.student.network, original)
    assert scratch.student.denoiser.kind == "edm"
    assert isinstance(teacher.function.denoiser, DenoiserView)


def test_a_student_that_starts_from_a_teacher_is_its_denoiser_in_a_continuous_curriculum() -> None:
    method = built({}, curriculum="continuous")
    unet = copied(method.parts.need_teacher().denoiser.network).eval()
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.004, 0.7, 60.0], dtype=torch.float64)
    method.eval()
    with torch.no_grad():
        expected = edm_denoiser(lambda x, t: unet(x, t).sample)(x, sigma.view(-1, 1, 1, 1))
        torch.testing.assert_close(
            method.predict(x, sigma, Condition({}, {})), expected, rtol=1e-5, atol=1e-5
        )


def test_an_architecture_of_its_own_is_built_from_its_arguments() -> None:
    method = pixel_ict(network={**GREY, "block_out_channels": (4, 8), "_class_name": "UNet2DModel"})
    assert method.student.network.config.block_out_channels == (4, 8)
    assert method.student.denoiser.process is method.process is method.function.denoiser.process


def test_dropout_is_set_in_every_residual_block_of_the_student_alone() -> None:
    method = built({"dropout": 0.3})
    teacher = method.parts.need_teacher().denoiser.network
    blocks = [m for m in method.student.network.modules() if isinstance(m, ResnetBlock2D)]
    assert len(blocks) > 4 and {b.dropout.p for b in blocks} == {0.3}
    assert {m.dropout.p for m in teacher.modules() if isinstance(m, ResnetBlock2D)} == {0.0}
    with pytest.raises(UserError, match=r"student\.dropout: Linear has no residual blocks; leave it out"):
        set_dropout(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"kind": "lora"}, "student.kind: lora: this method trains all weights; set it to full"),
        ({"network": GREY}, "student.network: has no effect beside init: teacher; set student.init to scratch"),
        (
            {"init": "scratch", "network": {**GREY, "chanels": 3}},
            "student.network.chanels: UNet2DModel takes no such argument",
        ),
        ({"init": "scratch", "network": {"_class_name": "UNet9"}}, "student.network: diffusers has no model 'UNet9'"),
        (
            {"init": "scratch", "network": {"_class_name": "DDPMScheduler"}},
            "student.network: diffusers has no model 'DDPMScheduler'",
        ),
        (
            {"init": "scratch", "network": {**GREY, "norm_num_groups": 7}},
            "student.network: UNet2DModel refuses this",
        ),
        (
            {"init": "scratch", "network": {"_class_name": "AutoencoderKL"}},
            "network: no adapter for a AutoencoderKL",
        ),
    ],
)  # fmt: skip
def test_students_that_cannot_be_are_refused_in_one_line(student: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        built(student)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_min": 2.0, "sigma_max": 2.0}, "method.sigma_min: 2.0 is not below method.sigma_max 2.0"),
        ({"two_step_sigma": 80.0}, "method.two_step_sigma: 80.0 is outside 0.002..80.0"),
        ({"two_step_sigma": 0.001}, "method.two_step_sigma: 0.001 is outside 0.002..80.0"),
        ({"s0": 20, "s1": 10}, "method.s0: 20 is above method.s1 10"),
        ({"curriculum": "continuous", "noise": "uniform"}, "method.noise: uniform: continuous pairs are lognormal"),
        ({"guidance_scale": 2.0}, "method.guidance_scale: 2.0 guides the teacher's steps; set ode_source to teacher"),
        ({"sigma_data": 0.4}, "method.sigma_data: 0.4, but the teacher's network was made for 0.5"),
        ({"sigma_max": 90.0}, "method.sigma_min, sigma_max: 0.002 to 90.0, but the teacher's noise goes from 0.002"),
        ({"sigma_min": 0.001}, "method.sigma_min, sigma_max: 0.001 to 80.0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built({}, **settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("q", 1),
        ("p_std", 0),
        ("target_decay", 1),
        ("num_points", 1),
        ("guidance_scale", 0.5),
        ("huber_c", -1),
    ],
)
def test_values_out_of_range_are_refused_by_key(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"method.{key}: {value} does not fit"):
        validate(ICTSettings, {key: value}, "method.")


def test_what_is_missing_is_named() -> None:
    scratch = StudentSettings(init="scratch")
    for student, settings, message in (
        (StudentSettings(), {}, "teacher: missing"),
        (scratch, {}, "student.network: missing; without a teacher the architecture must be given"),
        (StudentSettings(init="scratch", network=GREY), {"ode_source": "teacher"}, "teacher: missing"),
    ):
        with pytest.raises(UserError, match=message):
            ICT(ICTSettings(**settings), Parts(None, student, [], (), 8))


def test_guidance_of_a_network_that_was_never_without_its_condition_is_refused() -> None:
    method = built({}, ode_source="teacher", guidance_scale=2.0)
    with pytest.raises(UserError, match="guidance_scale: the network was never trained without"):
        step(method, pixel_batch(method))


def test_the_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    method = pixel_ict(network=CLASSED, classes=CLASSES)
    whole = step(method, pixel_batch(method, range(6)))["loss"]
    parts = [step(method, pixel_batch(method, rows))["loss"] for rows in (range(3), range(3, 6))]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=0)
    assert (parts[0] - parts[1]).abs() > 1e-3


def test_the_exported_levels_are_the_published_ones() -> None:
    cifar, imagenet = pixel_ict(), pixel_ict(two_step_sigma=1.526)
    assert cifar.calls() == {"1": {"timesteps": [0]}, "2": {"timesteps": [788, 0]}}
    assert imagenet.calls()["2"] == {"timesteps": [709, 0]}
    assert cifar.times(1) == [80.0]
    assert cifar.times(2) == pytest.approx([80.0, 0.82087], abs=5e-6)
    assert pixel_ict(two_step_sigma=79.99).calls()["2"] == {"timesteps": [1, 0]}
    assert imagenet.times(2) == pytest.approx([80.0, 1.52577], abs=5e-6)


def method_of(case: str) -> ICT:
    if case == "classes":
        return pixel_ict(
            network=CLASSED, classes=CLASSES, sigma_min=0.005, sigma_max=50.0, sigma_data=0.4, rho=5.0
        )
    if case == "teacher":
        return shaken(
            pixel_ict(network=None, teacher=pixel_teacher(sigma_data=0.6), sigma_data=0.6, dropout=0.5)
        )
    return pixel_ict()


def sampled(method: ICT, num_steps: int, seeds: list[int]) -> Tensor:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return method.sample([CLASSES[s % 3] for s in seeds], num_steps, generators)


@pytest.mark.parametrize("case", ["grey", "classes", "teacher"])
def test_the_exported_pipeline_gives_the_methods_samples(case: str) -> None:
    method = method_of(case).eval()
    export = method.export()
    assert isinstance(export.model, ConsistencyModelPipeline) and export.sampling == method.calls()
    assert export.model.scheduler.config.clip_denoised
    export.model.scheduler.register_to_config(clip_denoised=False)
    export.model.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 2]) if case == "classes" else None
    for steps in ("1", "2"):
        ours = sampled(method, int(steps), [3, 8])
        theirs = export.model(
            2,
            labels,
            generator=[torch.Generator().manual_seed(s) for s in (3, 8)],
            output_type="pt",
            **export.sampling[steps],
        ).images
        assert (ours.abs() < 1).float().mean() > 0.9 and not ours.requires_grad
        assert ((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < rounding(export.model.unet, int(steps))
        assert (ours[0] - ours[1]).norm() > 1e-2 * ours.norm()


def test_samples_depend_on_their_own_seed_and_class_only() -> None:
    method = method_of("classes").eval()
    whole = sampled(method, 2, [3, 8, 1])
    assert ((sampled(method, 2, [8]) - whole[1]).norm() / whole[1].norm()).item() < 1e-5
    other = method.sample([CLASSES[0]], 2, seeded(1, 8))
    assert (other - whole[1]).norm() > 1e-2 * whole[1].norm()


def test_pictures_are_one_and_two_steps_in_colour() -> None:
    method = pixel_ict().eval()
    rows, again = method.pictures(["", ""], 4), method.pictures(["", ""], 4)
    assert list(rows) == ["1 steps", "2 steps"]
    for n, (title, row) in enumerate(rows.items(), start=1):
        expected = method.sample(["", ""], n, seeded(2, 4)).expand(-1, 3, -1, -1)
        assert torch.equal(row, expected) and torch.equal(again[title], row)


def test_a_network_without_a_stock_pipeline_is_refused() -> None:
    network = {"_class_name": "TwoTimeDiT", "sample_size": 8, "in_channels": 3, "num_layers": 1}
    student = StudentSettings(init="scratch", network=network)
    with pytest.raises(UserError, match="TwoTimeDiT has no stock consistency pipeline"):
        ICT(ICTSettings(), Parts(None, student, [], (), 8))
