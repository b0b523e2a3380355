"""The latent consistency student: its start, target, LoRA, checkpoint, samples and exported pipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.settings import LCDSettings
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.checkpoint import kept_state
from fewstep.distill.training.contract import Parts
from torch import Tensor

Build = Callable[..., LCD]
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8)
CAPTIONS = ["red cat", "dog", "cat", "red dog", "a red red dog", "go"]


@pytest.mark.parametrize("student", [None, LORA])
def test_the_student_is_the_teacher_at_step_0_for_every_omega(
    student: StudentSettings | None, build_lcd: Build
) -> None:
    method = build_lcd(student=student)
    condition = method.teacher.condition(CAPTIONS)
    z, t = torch.randn(6, 4, 8, 8), torch.linspace(0, 999, 6)
    with torch.no_grad():
        answers = [
            method.student.denoiser(z, t, method.embedded(condition, torch.full((6,), w)))
            for w in (5.0, 15.0)
        ]
        teacher = method.teacher.denoiser(z, t, condition)
    assert torch.equal(answers[0].output, teacher.output)
    assert torch.equal(answers[1].output, teacher.output)


def test_the_target_follows_the_student_after_its_turn(build_lcd: Build) -> None:
    method = build_lcd(target_decay=0.9)
    assert method.target is not None
    start = {k: v.clone() for k, v in method.target.tensors().items()}
    assert set(start) == set(method.student.trained())
    with torch.no_grad():
        for p in method.student.trained().values():
            p.add_(1.0)
    method.after("student")
    for name, average in method.target.tensors().items():
        torch.testing.assert_close(average, start[name] + 0.1, rtol=0, atol=1e-6)


def test_a_lora_has_one_base_network_and_its_teacher_step_ignores_the_adapter(build_lcd: Build) -> None:
    plain = build_lcd()
    method = build_lcd(student=LORA, target_decay=0.9, shake=0.2)
    assert method.target is None
    assert method.student.network is method.teacher.denoiser.network is method.teacher.pipeline.unet
    z, w = torch.randn(6, 4, 8, 8), torch.full((6,), 7.5)
    t_hi, t_lo = torch.full((6,), 519.0), torch.full((6,), 499.0)
    condition = method.teacher.condition(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(
            *(m.teacher_step(z, t_hi, t_lo, condition, w, Draws(0, 0, range(6))) for m in (method, plain))
        )
        moved, still = (m.function(z, t_hi, condition) for m in (method, plain))
    assert (moved - still).abs().max() > 1e-2


def test_a_checkpoint_holds_the_trained_weights_and_the_target_only(build_lcd: Build) -> None:
    full, lora = build_lcd(), build_lcd(student=LORA)
    trained = len(full.student.trained())
    assert len(kept_state(full)) == 2 * trained + 1  # and the count of updates
    assert len(kept_state(lora)) == len(lora.student.trained())
    assert all("lora" in k for k in kept_state(lora))


def sampled(method: LCD, num_steps: int, w: float, seeds: list[int]) -> Tensor:
    captions = [CAPTIONS[s % len(CAPTIONS)] for s in seeds]
    return method.sample(captions, num_steps, w, [torch.Generator().manual_seed(s) for s in seeds])


def test_samples_depend_on_omega_and_on_their_own_seed_only(build_lcd: Build) -> None:
    method = build_lcd(shake=0.05)
    whole = sampled(method, 2, 7.5, [3, 8, 1])
    assert ((sampled(method, 2, 7.5, [8]) - whole[1]).norm() / whole[1].norm()).item() < 1e-5
    assert (sampled(method, 2, 12.0, [3, 8, 1]) - whole).norm() > 1e-2 * whole.norm()
    assert not whole.requires_grad


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("student", [None, LORA])
def test_the_exported_pipeline_gives_the_methods_samples(
    student: StudentSettings | None, prediction: str, build_lcd: Build
) -> None:
    """By the call arguments that go with it: guidance_scale = omega + 1, or 1 for a LoRA."""
    method = build_lcd(prediction=prediction, student=student, shake=0.05)
    export = method.export()
    assert list(export.sampling) == ["1", "2", "3", "4", "6", "8"]
    assert (export.adapter is not None) == method.student.lora
    export.model.set_progress_bar_config(disable=True)
    for steps in ("1", "4"):
        ours = sampled(method, int(steps), method.settings.w_export, [3, 8])
        generators = [torch.Generator().manual_seed(s) for s in (3, 8)]
        prompts = [CAPTIONS[3], CAPTIONS[2]]
        theirs = export.model(
            prompts, generator=generators, output_type="latent", **export.sampling[steps]
        ).images
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_min": 9.0, "w_max": 8.0}, "method.w_min: 9.0 is above method.w_max 8.0"),
        ({"w_export": 4.9}, "method.w_export: 4.9 is outside the trained range 5.0..15.0"),
        (
            {"num_ddim_timesteps": 60},
            "method.num_ddim_timesteps: 60 does not divide the teacher's 1000 steps",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(
    settings: dict[str, Any], message: str, build_lcd: Build
) -> None:
    with pytest.raises(UserError, match=message):
        build_lcd(**settings)


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="teacher: missing"):
        LCD(LCDSettings(), Parts(None, StudentSettings(), []))
