"""Networks with a second time: their adapters, their students, and views of them in another process."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import DenoiserView, Prediction, reach, seen_in
from fewstep.distill.diffusion.process import VP, NoiseProcess, RectifiedFlow
from fewstep.distill.errors import UserError
from fewstep.distill.models.network_adapters import TwoTimeDiTDenoiser, TwoTimeUNetDenoiser, denoiser_of
from fewstep.distill.models.student import Student, new_denoiser
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.settings import StudentSettings
from fewstep.pipelines.transformer_two_time import TwoTimeDiT
from torch import Tensor

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
T, R = torch.tensor([0.3, 0.8]).double(), torch.tensor([0.1, 0.8]).double()


@pytest.fixture
def teacher(tiny_pipeline: Path) -> LatentTeacher:
    return LatentTeacher(StableDiffusionPipeline.from_pretrained(tiny_pipeline), str(tiny_pipeline))


def two_times(base: object) -> Student:
    student = Student(base, StudentSettings(), two_times=True)  # type: ignore[arg-type]
    return student.eval()


def test_the_student_is_the_teacher_at_every_span_at_step_0(teacher: LatentTeacher) -> None:
    student = two_times(teacher.denoiser)
    assert type(student.denoiser) is TwoTimeUNetDenoiser
    assert student.network.config.class_embed_type == "timestep"
    z, condition = torch.randn(2, 4, 8, 8), teacher.condition(["red cat", "dog"])
    t, r = torch.tensor([300.0, 999.0]), torch.tensor([0.0, 999.0])
    with torch.no_grad():
        ours, theirs = student.denoiser(z, t, condition, r=r), teacher.denoiser(z, t, condition)
        assert torch.equal(ours.output, theirs.output)
        assert torch.equal(student.denoiser(z, t, condition).output, theirs.output)
    trained = student.trained()
    extra = {k for k in trained if k.startswith("class_embedding")}
    assert len(trained) == len(list(teacher.denoiser.network.parameters())) + len(extra) and len(extra) == 4


def test_the_span_is_the_share_of_the_network_s_own_range(teacher: LatentTeacher) -> None:
    """(t - r) / 999 under Stable Diffusion's steps, t - r itself in straight paths; without r, 0."""
    z, t, r = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 999.0]), torch.tensor([1.0, 0.0])
    condition = teacher.condition(["red cat", "dog"])
    steps = two_times(teacher.denoiser).denoiser
    torch.testing.assert_close(
        steps.call(z, t, r, condition)[1]["class_labels"], torch.tensor([499 / 999, 1])
    )
    assert steps.call(z, t, None, condition)[1]["class_labels"].tolist() == [0, 0]
    straight = denoiser_of(steps.network, RectifiedFlow(), "velocity")
    positional, keywords = straight.call(z, T, R, condition)
    torch.testing.assert_close(keywords["class_labels"], torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(positional[1], T.float())


def test_other_networks_refuse_a_second_time(teacher: LatentTeacher) -> None:
    z, condition = torch.randn(2, 4, 8, 8), teacher.condition(["red cat", "dog"])
    with pytest.raises(ValueError, match="one time"):
        teacher.denoiser(z, T, condition, r=R)
    pixels = denoiser_of(UNet2DModel(**UNET), RectifiedFlow(), "velocity")
    with pytest.raises(ValueError, match="one time"):
        pixels(torch.randn(2, 3, 8, 8), T, Condition({}, {}), r=R)


def test_students_of_pixels_take_a_span_but_no_classes_beside_it() -> None:
    process = RectifiedFlow()
    student = two_times(new_denoiser(UNET, process, "velocity"))
    x, nothing = torch.randn(2, 3, 8, 8), Condition({}, {})
    plain = student.denoiser(x, T, nothing, r=R).output
    torch.nn.init.normal_(student.network.class_embedding.linear_2.weight)
    moved = student.denoiser(x, T, nothing, r=R).output
    same = student.denoiser(x, T, nothing, r=R - T + 0.5, weights=None).output
    assert (moved - plain).abs().max() > 1e-3 and (moved - same).abs().max() > 1e-3
    with pytest.raises(UserError, match="told a class where its second time would go"):
        two_times(new_denoiser({**UNET, "num_class_embeds": 3}, process, "velocity"))


@pytest.mark.parametrize(
    ("name", "sizes", "parameters", "span"),
    [
        ("B/4", {"patch_size": 4}, 131_165_248, 787_968),
        ("B/2", {}, 131_091_472, 787_968),
        ("L/2", {"num_layers": 24, "num_attention_heads": 16}, 459_137_040, 1_312_768),
        (
            "XL/2",
            {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
            676_440_592,
            1_624_320,
        ),
    ],
)
def test_transformers_have_the_papers_numbers_of_parameters(
    name: str, sizes: dict, parameters: int, span: int
) -> None:
    with torch.device("meta"):
        network = TwoTimeDiT(**sizes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in network.span_embedding.parameters()) == span


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network


def test_a_transformer_depends_on_time_span_and_label_and_starts_at_zero() -> None:
    network = TwoTimeDiT(**SIZES, num_class_embeds=3)
    denoiser = denoiser_of(network, RectifiedFlow(), "velocity")
    assert type(denoiser) is TwoTimeDiTDenoiser
    x, labels = torch.randn(2, 4, 4, 4), Condition({"class_labels": torch.tensor([0, 3])}, {})
    assert not denoiser(x, T, labels, r=R).output.any()
    shaken(network)
    base = denoiser(x, T, labels, r=R).output
    for other in (
        denoiser(x, T + 0.1, labels, r=R + 0.1),
        denoiser(x, T, labels, r=R - 0.05),
        denoiser(x, T, Condition({"class_labels": torch.tensor([1, 2])}, {}), r=R),
    ):
        assert (other.output - base).flatten(1).norm(dim=1).min() > 1e-3
    assert torch.equal(denoiser(x, T, labels, r=T).output, denoiser(x, T, labels).output)


def test_a_transformer_puts_every_patch_where_it_came_from() -> None:
    """With no blocks and no position, the output at a pixel depends on its own patch alone."""
    network = TwoTimeDiT(**{**SIZES, "num_layers": 0}, num_class_embeds=None)
    shaken(network)
    x = torch.randn(1, 4, 4, 4)
    changed = x.clone()
    changed[:, :, 2:, :2] += 1
    t, h = torch.tensor([0.5]), torch.tensor([0.2])
    moved = (network(changed, t, h)[0] - network(x, t, h)[0]).abs().sum(1)[0] > 1e-6
    assert moved[2:, :2].all() and moved.sum() == 4


def test_checkpointing_changes_no_gradient() -> None:
    network = shaken(TwoTimeDiT(**SIZES, num_class_embeds=None))
    x, t, h = torch.randn(2, 4, 4, 4), torch.tensor([0.5, 0.9]), torch.tensor([0.2, 0.0])
    plain = torch.autograd.grad(network(x, t, h)[0].square().sum(), list(network.parameters()))
    network.enable_gradient_checkpointing()
    again = torch.autograd.grad(network(x, t, h)[0].square().sum(), list(network.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_velocity_views_of_every_process(teacher: LatentTeacher) -> None:
    """A velocity output gives back the data and noise that it was made from."""
    vp: VP = teacher.noise
    processes: list[tuple[NoiseProcess, Tensor]] = [(vp, torch.tensor([3.0, 519.5])), (RectifiedFlow(), T)]
    for process, t in processes:
        t = t.double()
        x0, eps = torch.randn(2, 2, 5, dtype=torch.float64)
        v = process.alpha_dot(t)[:, None] * x0 + process.sigma_dot(t)[:, None] * eps
        seen = Prediction(v, process.noised(x0, eps, t), t, process, "velocity")
        torch.testing.assert_close(seen.x0, x0)
        torch.testing.assert_close(seen.eps, eps)
        assert torch.equal(seen.velocity, v)


def test_the_view_of_a_teacher_in_straight_paths(teacher: LatentTeacher) -> None:
    """v = eps^ - x0^ of the network at y = (alpha + sigma) z and the step of equal signal-to-noise."""
    process, vp = RectifiedFlow(), teacher.noise
    view = seen_in(teacher.denoiser, process)
    assert isinstance(view, DenoiserView)
    assert reach(view) == pytest.approx((0.0283, 0.93596), abs=5e-5)
    assert reach(denoiser_of(view.network, process, "velocity")) == (0.0, 1.0)
    z, t = torch.randn(2, 4, 8, 8), T
    condition = teacher.condition(["red cat", "dog"])
    s = vp.time_of(2 * ((1 - t) / t).log())
    a, b = (c.float().view(-1, 1, 1, 1) for c in (vp.alpha(s), vp.sigma(s)))
    with torch.no_grad():
        network: UNet2DConditionModel = teacher.pipeline.unet
        y = (a + b) * z
        eps = network(y, s.float(), condition.arguments["encoder_hidden_states"]).sample
        ours = view(z, t, condition).velocity
    torch.testing.assert_close(ours, eps - (y - b * eps) / a, rtol=1e-4, atol=1e-5)


def test_a_view_maps_the_second_time_as_the_first(teacher: LatentTeacher) -> None:
    student = two_times(teacher.denoiser)
    seen: list[Tensor] = []
    call = student.denoiser.call

    def spy(x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        out = call(x_t, t, r, condition)
        seen.append(out[1]["class_labels"])
        return out

    student.denoiser.call = spy  # type: ignore[method-assign]
    view = seen_in(student.denoiser, RectifiedFlow())
    r = torch.tensor([0.1, 0.0]).double()
    with torch.no_grad():
        view(torch.randn(2, 4, 8, 8), T, teacher.condition(["red cat", "dog"]), r=r)
    steps = [teacher.noise.time_of(2 * ((1 - a) / a).log()) for a in (T, r)]
    torch.testing.assert_close(seen[0], ((steps[0] - steps[1]) / 999).float())
    assert steps[1][1] == 0  # nothing is nearer to the data than the network's first step
