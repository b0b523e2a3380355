"""Distribution matching: recorded losses, laws of time, and the fake score's two forms."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser, Prediction, seen_in
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.process import EDM, VP, NoiseProcess, RectifiedFlow, TrigFlow
from fewstep.distill.methods.score_distillation.score import (
    FakeScore,
    lognormal_times,
    matching_loss,
    native_times,
    output_weight,
    shifted_times,
    velocity_loss,
)
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.settings import StudentSettings
from torch import Tensor, nn

G, FAKE, TEACHER = (
    torch.tensor([v], dtype=torch.float64)
    for v in ([1.0, 2.0, -1.0, 0.5], [0.9, 1.5, -1.2, 0.4], [1.1, 1.8, -0.7, 0.6])
)


def test_recorded_matching_loss_and_its_gradient() -> None:
    sample = G.clone().requires_grad_()
    loss = matching_loss(sample, FAKE, TEACHER)
    assert loss.item() == pytest.approx(13.71428571, abs=1e-8)
    (gradient,) = torch.autograd.grad(loss.sum(), sample)
    assert gradient[0].tolist() == pytest.approx(
        [-2.28571429, -3.42857143, -5.71428571, -2.28571429], abs=1e-8
    )


def test_a_sample_that_is_not_finite_gives_nothing_and_leaves_the_others() -> None:
    sample = G.repeat(3, 1).requires_grad_()
    fake, teacher = FAKE.repeat(3, 1), TEACHER.repeat(3, 1)
    fake[1, 2], teacher[2, 0] = math.nan, math.inf
    loss = matching_loss(sample, fake, teacher)
    assert loss.tolist() == pytest.approx([13.71428571, 0, 0], abs=1e-8)
    (gradient,) = torch.autograd.grad(loss.sum(), sample)
    assert (gradient[1:] == 0).all() and (gradient[0] != 0).all()
    exact = matching_loss(G, FAKE, G)  # a teacher that agrees: the divisor has a floor of 1e-5
    assert exact.item() == pytest.approx((FAKE - G).square().sum().item() * 1e10, rel=1e-9)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_recorded_loss_of_the_fake_score(sigma_data: float) -> None:
    """|G - f|^2 / sin^2 t as it is written in the paper's code."""
    process, t = TrigFlow(sigma_data), torch.tensor([0.9], dtype=torch.float64)
    eps = torch.randn_like(G)
    x = process.noised(G, eps, t)
    network = (t.cos() * x - FAKE) / (sigma_data * t.sin())  # whose f is FAKE
    seen = Prediction(network, x, t, process, "trigflow")
    torch.testing.assert_close(seen.x0, FAKE)
    assert velocity_loss(seen, G, eps).item() == pytest.approx(0.5052142615 / sigma_data**2, abs=1e-9)


def test_laws_of_time() -> None:
    draws = Draws(0, 0, range(4000))
    for process in (TrigFlow(), TrigFlow(0.5)):
        u = (process.sigma_data * lognormal_times(draws, process, -0.8, 1.6).tan()).log()
        assert u.mean().item() == pytest.approx(-0.8, abs=0.1)
        assert u.std().item() == pytest.approx(1.6, abs=0.06)
    t = shifted_times(Draws(1, 0, range(4000)), TrigFlow(), 5.0)
    tau = t.sin() / (t.sin() + t.cos())
    uniform = tau / (5 - 4 * tau)
    assert uniform.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist() == pytest.approx(
        [0.1, 0.5, 0.9], abs=0.03
    )
    edges = torch.tensor([0.0, 1.0])
    vp = VP(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double().square().neg().add(1).cumprod(0))
    for native in (vp, RectifiedFlow(), EDM()):
        process = TrigFlow()
        t = native_times(Draws(2, 0, range(2000)), process, native, 0.02, 0.98)
        own = native.time_of(process.log_snr(t))
        if isinstance(native, EDM):
            own = own ** (1 / 7)
        low, high = (native.share(edges) ** (1 / 7 if isinstance(native, EDM) else 1)).tolist()
        share = (own - low) / (high - low)
        assert 0.0199 < share.min() < 0.03 and 0.97 < share.max() < 0.9801
        assert share.mean().item() == pytest.approx(0.5, abs=0.02)


class Given(Denoiser):
    """A denoiser whose network gives `output` whatever it is asked."""

    def __init__(self, output: Tensor, process: NoiseProcess, kind: str):
        super().__init__(nn.Identity(), process, kind)
        self.output = output

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return ((self.output,),), {}


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "velocity", "trigflow"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_output_weight_is_one_over_what_the_output_moves(kind: str, sigma_data: float) -> None:
    """|dF/d output| of the view by autograd; of v and straight paths it is near 1 and left alone."""
    process = TrigFlow(sigma_data)
    own = {"velocity": RectifiedFlow(), "trigflow": process}.get(
        kind, VP(torch.linspace(0.9999, 0.004, 1000))
    )

    output = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    denoiser = seen_in(Given(output, own, kind), process)
    t = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    f = denoiser(torch.randn(3, 2).double(), t, Condition({}, {})).velocity / sigma_data
    (slope,) = torch.autograd.grad(f.sum(), output)
    moved = (output_weight(denoiser, t) * slope[:, 0].abs()).tolist()
    if kind in ("epsilon", "sample", "trigflow"):
        assert moved == pytest.approx([1.0] * 3, rel=1e-6)
    else:
        assert output_weight(denoiser, t).tolist() == [1.0] * 3
        assert all(0.5 < m <= 1 / sigma_data + 1e-6 for m in moved)


@pytest.fixture
def teacher(tiny_pipeline: Path) -> LatentTeacher:
    return LatentTeacher(StableDiffusionPipeline.from_pretrained(tiny_pipeline), str(tiny_pipeline))


@pytest.fixture(params=["full", "lora"])
def players(request: pytest.FixtureRequest, teacher: LatentTeacher) -> tuple[Student, FakeScore]:
    student = Student(teacher.denoiser, StudentSettings(kind=request.param, rank=2, lora_alpha=2))
    return student, FakeScore(teacher.denoiser, student)


def asked(fake: FakeScore, teacher: LatentTeacher, x: Tensor, **how: object) -> Prediction:
    t = torch.tensor([0.5, 1.2], dtype=torch.float64)
    return fake(TrigFlow(), x, t, teacher.condition(["red cat", "dog"]), **how)  # type: ignore[arg-type]


def test_the_fake_score_starts_as_the_teacher_and_has_weights_of_its_own(
    players: tuple[Student, FakeScore], teacher: LatentTeacher
) -> None:
    student, fake = players
    x = torch.randn(2, 4, 8, 8).double()
    own, others = list(fake.parameters()), list(student.trained().values())
    assert len(own) == len(others) and not {id(p) for p in own} & {id(p) for p in others}
    assert not any("_shared" in name for name in fake.state_dict())
    with torch.no_grad():
        first = asked(fake, teacher, x).x0
        for p in others:
            p.add_(0.1 * torch.randn_like(p))
        assert torch.equal(asked(fake, teacher, x).x0, first)
        for p in own:
            p.add_(0.1 * torch.randn_like(p))
        assert not torch.allclose(asked(fake, teacher, x).x0, first, atol=1e-2)
    asked(fake, teacher, x).x0.sum().backward()
    assert all(p.grad is not None for p in own) and all(p.grad is None for p in others)


def test_a_frozen_fake_score_passes_gradients_to_the_state_alone(
    players: tuple[Student, FakeScore], teacher: LatentTeacher
) -> None:
    student, fake = players
    network = (fake.own or student).network
    network.enable_gradient_checkpointing()
    x = torch.randn(2, 4, 8, 8).double().requires_grad_()
    with torch.no_grad():
        for p in fake.parameters():
            p.add_(0.1 * torch.randn_like(p))
    features = asked(fake, teacher, x, features=("mid_block",), frozen=True).features["mid_block"]
    features.square().sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 1e-4).all()
    assert all(p.grad is None for p in [*fake.parameters(), *student.trained().values()])
    plain = asked(fake, teacher, x, features=("mid_block",)).features["mid_block"]
    torch.testing.assert_close(features, plain)
    assert network.is_gradient_checkpointing
