"""MeanFlow on tiny real networks: where it starts, its derivative, its guidance, what it samples and exports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.diffusion.derivative import DERIVATIVES, derivative_of, total_derivative
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.meanflow.meanflow import MeanFlow
from fewstep.distill.methods.meanflow.settings import MeanFlowSettings
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor

SCRATCH = StudentSettings(init="scratch")
DIT = {"_class_name": "TwoTimeDiT", "sample_size": 8, "patch_size": 2, "num_class_embeds": 2}
DIT |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
UNET = {
    "sample_size": 16,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
CAPTIONS = ["red cat", "dog", "cat", "red dog", "a red red dog", "go"]
CLASSES = ("cat", "dog")
Build = Callable[..., MeanFlow]


def shake(method: MeanFlow, size: float) -> MeanFlow:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.student.trained().values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return method


@pytest.fixture
def build(tiny_pipeline: Path) -> Build:
    """build(student, shaken=, prediction=, **settings): MeanFlow with the tiny latent teacher."""

    def make(
        student: StudentSettings | None = None,
        *,
        shaken: float = 0.05,
        prediction: str = "epsilon",
        **settings: Any,
    ) -> MeanFlow:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        pipeline.scheduler.register_to_config(prediction_type=prediction)
        teacher = LatentTeacher(pipeline, str(tiny_pipeline))
        parts = Parts(teacher, student or StudentSettings(), CAPTIONS, CLASSES, 16)
        return shake(MeanFlow(MeanFlowSettings(**settings), parts), shaken)

    return make


def dit(**settings: Any) -> StudentSettings:
    return StudentSettings(init="scratch", network={**DIT, **settings})


def batch_of(method: MeanFlow, draws: Draws, rows: slice = slice(None)) -> Batch:
    mean, logvar = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    names = CAPTIONS if "prompts" in method.needs else [CLASSES[i % 2] for i in range(6)]
    posterior = torch.cat([5 * mean, logvar - 1], dim=1)[rows]
    return Batch(draws, latents=posterior, condition=method.space.condition(names[rows]))


def loss_of(method: MeanFlow, batch: Batch) -> Tensor:
    return method("student", batch, Progress(0, 10, {"student": 0}), {})["loss"]


def test_a_distilled_student_s_first_target_at_r_equal_t_is_itself(build: Build) -> None:
    """The unguided teacher's velocity, which the student starts with; at r < t the derivative is added."""
    method = build(shaken=0.0, source="teacher", ratio=0.0)
    assert loss_of(method, batch_of(method, Draws(0, 0, range(6)))).item() < 1e-6
    method = build(shaken=0.0, source="teacher", ratio=1.0)
    assert loss_of(method, batch_of(method, Draws(0, 0, range(6)))).item() > 0.1


def test_times_stay_within_what_the_teacher_was_trained_on(build: Build) -> None:
    taught, straight = build(), build(SCRATCH, p_mean=0.0, p_std=4.0)
    assert taught.within == pytest.approx((0.0283, 0.93596), abs=5e-5)
    assert taught.times(2) == pytest.approx([0.93596, 0.46798, 0.0], abs=5e-5)
    assert straight.within == (0.0, 1.0) and straight.times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert build(SCRATCH, source="teacher").within == taught.within
    taught.settings = MeanFlowSettings(p_mean=0.0, p_std=4.0)
    r, t = taught.spans(Draws(0, 0, range(300)))
    assert t.max() == taught.within[1] and r.min() == taught.within[0]


def test_the_teacher_is_guided_within_the_interval(build: Build) -> None:
    method = build(source="teacher", omega=3.0, guidance_start=0.3, guidance_end=0.6)
    assert method.source is not None
    z, t = torch.randn(6, 4, 8, 8), torch.linspace(0.1, 0.9, 6).double()
    told = method.space.condition(CAPTIONS)
    with torch.no_grad():
        plain, empty = (method.source(z, t, c).velocity for c in (told, told.null()))
        draws = Draws(0, 0, range(6))
        velocity, tangent, _ = method.velocities(z, z, z, t, Batch(draws, condition=told))
    inside = ((t >= 0.3) & (t <= 0.6)).view(-1, 1, 1, 1)
    expected = torch.where(inside, empty + 3 * (plain - empty), plain)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(velocity, tangent) and 0 < inside.sum() < 6


@pytest.mark.parametrize("student", ["teacher", "scratch", "dit"])
def test_all_back_ends_give_one_derivative(student: str, build: Build) -> None:
    method = build({"teacher": None, "scratch": SCRATCH, "dit": dit()}[student])
    generator = torch.Generator().manual_seed(0)
    z, tangent = torch.randn(2, 6, 4, 8, 8, generator=generator)
    t, r = torch.linspace(0.3, 0.8, 6).double(), torch.linspace(0.1, 0.6, 6).double()
    told = method.space.condition(CAPTIONS if student != "dit" else ["cat"] * 6)
    weights = {k: p.detach() for k, p in method.student.network.named_parameters()}
    found = {
        by: derivative_of(method.denoiser, weights, z, r, t, tangent, told, by=by, step=1e-2)
        for by in DERIVATIVES
    }
    assert all(not d.requires_grad and d.dtype == torch.float32 for d in found.values())
    reference = found["double_backward"]
    for by in ("kernel", "math"):
        assert ((found[by] - reference).norm() / reference.norm()).item() < 1e-5, by
    if student != "teacher":  # a step of 0.01 is ten of the teacher's, whose features of time turn in six
        gap = found["finite_difference"] - reference
        assert (gap.norm() / reference.norm()).item() < 1e-3


def test_finite_differences_pass_neither_r_nor_the_largest_time() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        seen.append((r, t))
        return (t**2 + z[:, 0] ** 2)[:, None]

    r, t = torch.tensor([0.2, 0.2, 0.899, 0.895]).double(), torch.tensor([0.5, 0.204, 0.9, 0.9]).double()
    z, v = torch.ones(4, 1), torch.full((4, 1), 2.0)
    out = total_derivative(u, z, r, t, v, by="finite_difference", step=5e-3, t_max=0.9)
    torch.testing.assert_close(out[:, 0].double(), 2 * t + 4, rtol=0, atol=0.03)
    assert out[0].item() == pytest.approx(5.0, abs=1e-5)  # central: exact for a quadratic
    (_, ahead), (_, behind) = seen
    assert ahead.tolist() == pytest.approx([0.505, 0.209, 0.9, 0.9])
    assert behind.tolist() == pytest.approx([0.495, 0.204, 0.895, 0.895])


def test_the_derivative_is_in_float32_under_autocast(build: Build) -> None:
    method = build(SCRATCH)
    z, tangent = torch.randn(2, 6, 4, 8, 8)
    t, r = torch.linspace(0.3, 0.8, 6).double(), torch.linspace(0.1, 0.6, 6).double()
    told = method.space.condition(CAPTIONS)
    plain = method.rate(z, r, t, tangent, told)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.rate(z, r, t, tangent, told), plain)


def test_all_passes_share_one_dropout_mask(build: Build) -> None:
    """With a mask of its own, the derivative would belong to another network than the one that is graded."""
    method = build(StudentSettings(init="scratch", dropout=0.5), ratio=1.0).train()
    states: list[Tensor] = []
    method.student.network.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    loss_of(method, batch_of(method, Draws(0, 0, range(6))))
    assert len(states) == 2 and torch.equal(*states)
    assert not torch.equal(torch.get_rng_state(), states[0])
    assert method.drops and not build(SCRATCH).drops


@pytest.mark.parametrize("student", ["teacher", "dit"])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(student: str, build: Build) -> None:
    method = build(dit() if student == "dit" else None, ratio=0.6, omega=1.5, condition_dropout=0.3)
    whole = loss_of(method, batch_of(method, Draws(1, 2, range(6))))
    parts = [
        loss_of(method, batch_of(method, Draws(1, 2, rows), slice(rows.start, rows.stop)))
        for rows in (range(3), range(3, 6))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "blocks"), [("infonce_l2", 1), ("mp1", 2)])
def test_dispersion_is_summed_over_blocks_and_has_a_gradient(kind: str, blocks: int, build: Build) -> None:
    names = tuple(f"transformer_blocks.{i}" for i in range(blocks))
    method = build(dit(), dispersive=kind, dispersive_blocks=names, dispersive_weight=0.5)
    batch = batch_of(method, Draws(0, 0, range(6)))
    out = method("student", batch, Progress(0, 10, {"student": 0}), {})
    plain = loss_of(build(dit()), batch_of(method, Draws(0, 0, range(6))))
    torch.testing.assert_close(out["loss"], plain + 0.5 * out["dispersion"])
    low = blocks * torch.tensor(1 / 6).log().item()
    assert low < out["dispersion"].item() < -1e-4
    slopes = torch.autograd.grad(out["dispersion"], method.players()["student"], allow_unused=True)
    assert any(s is not None and s.abs().max() > 1e-7 for s in slopes)


def test_pixels_and_their_export() -> None:
    parts = Parts(None, StudentSettings(init="scratch", network=UNET), [], ("cat", "dog"), 16)
    method = shake(MeanFlow(MeanFlowSettings(), parts), 0.05)
    assert method.needs == {"images"}
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert loss_of(method, Batch(Draws(0, 0, range(4)), images=images)).isfinite()
    assert_exported(method, ["", ""], {"batch_size": 2}, exact=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_exported_pipeline_of_a_taught_student_gives_the_methods_samples(
    prediction: str, build: Build
) -> None:
    method = build(prediction=prediction)
    assert_exported(method, ["cat", "red dog"], {"prompt": ["cat", "red dog"]}, exact=False)


def test_the_exported_pipelines_of_new_weights_give_the_methods_samples_bit_for_bit(build: Build) -> None:
    assert_exported(build(SCRATCH), ["cat", "red dog"], {"prompt": ["cat", "red dog"]}, exact=True)
    assert_exported(build(dit()), ["dog", "cat"], {"batch_size": 2, "class_labels": [1, 0]}, exact=True)


def assert_exported(method: MeanFlow, captions: list[str], call: dict[str, Any], exact: bool) -> None:
    method.eval()
    export = method.export()
    export.model.set_progress_bar_config(disable=True)
    assert list(export.sampling) == ["1", "2", "4"]
    for steps, arguments in export.sampling.items():
        ours = method.sample(captions, int(steps), [torch.Generator().manual_seed(s) for s in (3, 8)])
        generators = [torch.Generator().manual_seed(s) for s in (3, 8)]
        theirs = export.model(**call, **arguments, generator=generators, output_type="latent").images
        even = export.model(
            **call, num_inference_steps=int(steps), output_type="latent",
            generator=[torch.Generator().manual_seed(s) for s in (3, 8)],
        ).images  # fmt: skip
        assert torch.equal(theirs, even)
        if exact:
            assert torch.equal(ours, theirs)
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (StudentSettings(kind="lora"), {}, "student.kind: lora: the second time needs weights of its own"),
        (StudentSettings(network=DIT), {}, "student.network: has no effect beside init: teacher"),
        (dit(), {"source": "teacher"}, "method.source: teacher, but the student takes no texts"),
        (None, {"source": "teacher", "kappa": 0.5}, "method.kappa: it mixes in the student's velocity"),
        (None, {"guidance_start": 0.6, "guidance_end": 0.3}, "method.guidance_start: 0.6 is above"),
        (None, {"span_law": "separate"}, "method.r_mean, r_std: span_law separate needs both"),
        (None, {"r_mean": 1.0, "r_std": 1.0}, "method.r_mean, r_std: .* sorted takes neither"),
        (None, {"dispersive": "mp1"}, "method.dispersive_blocks: name the modules to disperse"),
        (
            None,
            {"dispersive": "mp1", "dispersive_blocks": ("nowhere",)},
            "method.dispersive_blocks: the network has no module 'nowhere'",
        ),
        (dit(sample_size=16), {}, "student.network: in_channels 4, sample_size 16, but the latents of 16 px"),
        (dit(num_class_embeds=1), {}, "num_class_embeds: 1, but the data have 2 classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(
    student: StudentSettings | None, settings: dict[str, Any], message: str, build: Build
) -> None:
    with pytest.raises(UserError, match=message):
        build(student, **settings)


def test_what_is_missing_without_a_teacher_is_named() -> None:
    for student, message in (
        (StudentSettings(), "student.init: teacher, but there is none"),
        (SCRATCH, "student.network: missing; without a teacher"),
    ):
        with pytest.raises(UserError, match=message):
            MeanFlow(MeanFlowSettings(), Parts(None, student, [], (), 16))
    parts = Parts(None, StudentSettings(init="scratch", network=UNET), [], (), 16)
    with pytest.raises(UserError, match="omega, kappa: the network is told nothing"):
        MeanFlow(MeanFlowSettings(omega=2.0), parts)


def test_class_conditional_latents_name_the_label_of_none(build: Build) -> None:
    """The row after the last class of the network, in the batch and in pictures."""
    space = build(dit(num_class_embeds=5)).space
    told = space.told(Batch(Draws(0, 0, range(2)), condition=space.condition(["dog", "cat"])))
    assert told.arguments["class_labels"].tolist() == [1, 0]
    assert told.null().arguments["class_labels"].tolist() == [5, 5]
