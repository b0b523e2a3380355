"""DMD2 on the tiny pipeline and on formulas: turns, losses by hand, the discriminator, who gets a gradient."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import reach
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.score_distillation.dmd2 import DMD2, head_of
from fewstep.distill.methods.score_distillation.settings import DMD2Settings
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts
from rcm_reference import Affine, batch_of, built, progress, straight
from torch import Tensor

NOTHING = Condition({}, {})
CAPTIONS = ["red cat", "dog", "cat", "go"]
TEACHER = (0.3, 0.7, -0.2)


def tiny(folder: Path, student: StudentSettings | None = None, **settings: Any) -> DMD2:
    teacher = LatentTeacher(StableDiffusionPipeline.from_pretrained(folder), str(folder))
    torch.manual_seed(0)
    method = DMD2(DMD2Settings(**settings), Parts(teacher, student or StudentSettings(), []))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in method.players().values():
            for p in group:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return method


def latents(method: DMD2, draws: Draws) -> Batch:
    posterior = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    return Batch(draws, latents=posterior, condition=method.space.condition(CAPTIONS))


def test_turns_and_steps() -> None:
    method = built(DMD2, straight(Affine(*TEACHER)), gan_weight=0.0)
    turns = [method.turns(progress(i)) for i in range(7)]
    assert turns == [
        ("student", "fake_score"),
        *[("fake_score",)] * 4,
        ("student", "fake_score"),
        ("fake_score",),
    ]
    assert method.sampling.calls()["4"]["sigmas"] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    times = method.rollout_times(Draws(0, 0, range(2)), 3)
    taus = [(t.sin() / (t.sin() + t.cos())).tolist() for t in times]
    assert [v for row in taus for v in row] == pytest.approx([1.0, 1.0, 0.75, 0.75, 0.5, 0.5])
    asked: list[int] = []
    method.rollout = lambda draws, told, n: asked.append(n) or torch.zeros(4, 1, 2, 2).double()
    batch = batch_of(Draws(0, 0, range(4)), torch.zeros(4, 1, 2, 2).double())
    carry: dict[str, Any] = {}
    method("student", batch, progress(student=2, fake_score=11), carry)
    method("fake_score", batch, progress(student=2, fake_score=11), carry)  # on the student's own samples
    method("fake_score", batch, progress(student=3, fake_score=12), {})
    assert asked == [3, 1]


def test_the_four_times_are_the_official_ones(tiny_pipeline: Path) -> None:
    assert tiny(tiny_pipeline).sampling.steps == [999, 749, 499, 249]
    assert tiny(tiny_pipeline, num_steps=1).sampling.calls() == {"1": {"timesteps": [999]}}


def test_losses_by_hand() -> None:
    """0.5 mean (G - sg(G - grad))^2, and the mean squared error of eps, as in the released code."""
    method = built(DMD2, straight(Affine(*TEACHER)), gan_weight=0.0)
    g, fake, real = torch.randn(3, 4, 1, 2, 2).double()
    method.rollout = lambda *_: g.requires_grad_()
    scores = method.scores
    method.scores = lambda *_: (fake, real)
    carry: dict[str, Any] = {}
    out = method("student", batch_of(Draws(0, 0, range(4)), 0 * real), progress(), carry)
    grad = (fake - real) / (g - real).abs().mean((1, 2, 3), keepdim=True)
    assert out["loss"].item() == pytest.approx(0.5 * grad.square().mean().item())
    (gradient,) = torch.autograd.grad(out["loss"], g)
    torch.testing.assert_close(gradient, grad / g.numel())
    assert not carry["sample"].requires_grad
    method.scores = scores
    draws = Draws(5, 0, range(4))
    out = method("fake_score", batch_of(Draws(5, 0, range(4)), 0 * real), progress(), {"sample": g.detach()})
    tau = draws.uniform().double().view(-1, 1, 1, 1)
    eps = draws.normal((1, 2, 2)).double()
    network = method.fake_score.own.network
    z = (1 - tau) * g.detach() + tau * eps
    found = z + (1 - tau) * network(z, tau.flatten())[0]
    assert out["loss"].item() == pytest.approx((found - eps).square().mean().item(), rel=1e-4)


def test_times_of_the_scores_keep_to_their_shares() -> None:
    method = built(DMD2, straight(Affine(*TEACHER)), gan_weight=0.0)
    asked: list[Tensor] = []
    method.scores = lambda sample, t, told, draws: asked.append(t) or (sample.detach(), sample.detach() + 1)
    for i in range(40):
        method("student", batch_of(Draws(i, 0, range(4)), torch.zeros(4, 1, 2, 2).double()), progress(), {})
    t = torch.cat(asked)
    tau = t.sin() / (t.sin() + t.cos())
    assert 0.02 <= tau.min() < 0.08 and 0.92 < tau.max() <= 0.98


def gradients(method: DMD2, loss: Tensor) -> dict[str, float]:
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: sum(p.grad.abs().sum().item() for p in group if p.grad is not None)
        for name, group in method.players().items()
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_player_moves_alone_and_hears_the_discriminator(kind: Any, tiny_pipeline: Path) -> None:
    method = tiny(
        tiny_pipeline, StudentSettings(kind=kind, rank=2, lora_alpha=2), gan_weight=5e-3, guidance_scale=2.0
    )
    assert method.head is not None
    carry: dict[str, Any] = {}
    out = method("student", latents(method, Draws(0, 0, range(4))), progress(), carry)
    assert out["loss"].item() == pytest.approx((out["matching"] + 5e-3 * out["adversarial"]).item())
    found = gradients(method, out["loss"])
    assert found["student"] > 0 and found["fake_score"] == 0
    assert all(p.requires_grad for group in method.players().values() for p in group)
    out = method("fake_score", latents(method, Draws(0, 0, range(4))), progress(), carry)
    assert out["loss"].item() == pytest.approx((out["score"] + 1e-2 * out["critic"]).item(), rel=1e-5)
    found = gradients(method, out["loss"])
    assert found["student"] == 0 and found["fake_score"] > 0
    alone = method("fake_score", latents(method, Draws(0, 0, range(4))), progress(), {})
    assert gradients(method, alone["loss"])["student"] == 0
    head = [p.grad.abs().sum().item() for p in method.head.parameters()]
    assert min(head) > 0
    assert all(p.grad is None for p in method.parts.teacher.vae.parameters())
    trained = {k for k, p in method.named_parameters() if p.requires_grad}
    assert set(method.averaged()) == {k for k in trained if k.startswith("student.")}


def test_a_loras_teacher_ignores_the_adapter_and_gives_no_gradient(tiny_pipeline: Path) -> None:
    lora = tiny(tiny_pipeline, StudentSettings(kind="lora", rank=2, lora_alpha=2), guidance_scale=2.0)
    plain = tiny(tiny_pipeline, guidance_scale=2.0)
    x, t = torch.randn(4, 4, 8, 8).double().requires_grad_(), torch.linspace(0.2, 1.4, 4).double()
    told = lora.space.condition(CAPTIONS)
    ours, theirs = lora.guided(x, t, told), plain.guided(x, t, told)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        student, empty = lora.denoiser(x, t, told).x0, plain.source(x, t, told.null()).x0
        assert not torch.allclose(student, plain.source(x, t, told).x0, atol=1e-2)
        by_hand = empty + 2 * (plain.source(x, t, told).x0 - empty)
    torch.testing.assert_close(ours[0], by_hand, rtol=1e-4, atol=1e-4)
    low, high = reach(lora.denoiser)
    assert low < lora.within[0] and lora.within[1] < high == lora.start_time


def test_the_scores_are_the_fakes_then_the_teachers() -> None:
    """The fake one unguided at the same renoised state, neither with a gradient."""
    method = built(DMD2, straight(Affine(*TEACHER)), gan_weight=0.0)
    with torch.no_grad():
        next(iter(method.fake_score.parameters())).add_(1.0)
    sample, t = torch.randn(4, 1, 2, 2).double().requires_grad_(), torch.full((4,), 0.9).double()
    fake, teacher = method.scores(sample, t, NOTHING, Draws(0, 0, range(4)))
    eps = Draws(0, 0, range(4)).normal((1, 2, 2)).double()
    x = method.process.noised(sample.detach(), eps, t)
    torch.testing.assert_close(teacher, method.source(x, t, NOTHING).x0)
    torch.testing.assert_close(fake, method.fake_score(method.process, x, t, NOTHING).x0.detach())
    assert not torch.allclose(fake, teacher) and not fake.requires_grad and not teacher.requires_grad


def test_the_discriminator_sees_samples_at_a_new_noise_level(tiny_pipeline: Path) -> None:
    method = tiny(tiny_pipeline)
    seen: list[tuple[Tensor, Tensor]] = []
    method.fake_score.register_forward_pre_hook(lambda module, args: seen.append(args[1:3]))
    x0 = torch.randn(4, 4, 8, 8).double()
    method.judged(x0, method.space.condition(CAPTIONS), Draws(1, 0, range(4)))
    draws = Draws(1, 0, range(4))
    t = method.native(draws)
    assert torch.equal(seen[0][1], t)
    assert torch.equal(seen[0][0], method.process.noised(x0, draws.normal((4, 8, 8)).double(), t))


def test_the_discriminator_learns_to_tell_and_the_student_to_pass(tiny_pipeline: Path) -> None:
    method = tiny(tiny_pipeline)
    real, fake = torch.full((4, 4, 8, 8), 2.0).double(), torch.full((4, 4, 8, 8), -2.0).double()
    told = method.space.condition(CAPTIONS)

    def logits(x: Tensor, graded: bool = True) -> Tensor:
        return method.judged(x, told, Draws(1, 0, range(4)), graded)

    first = logits(real).mean() - logits(fake).mean()
    critic = F.softplus(-logits(real)).mean() + F.softplus(logits(fake)).mean()
    critic.backward()
    with torch.no_grad():
        for p in method.players()["fake_score"]:
            p.sub_(0.02 * p.grad / (p.grad.norm() + 1e-12)) if p.grad is not None else None
    assert logits(real).mean() - logits(fake).mean() > first
    fake.requires_grad_()
    (towards,) = torch.autograd.grad(F.softplus(-logits(fake, graded=False)).mean(), fake)
    assert logits(fake.detach() - 0.5 * towards / towards.norm()).mean() > logits(fake).mean()


def test_adversarial_losses_by_hand(tiny_pipeline: Path) -> None:
    """softplus(-D(G)); softplus(-D(real)) + softplus(D(G)): non-saturating, real latents on the real side."""
    method = tiny(tiny_pipeline)
    sample, seen = torch.randn(4, 4, 8, 8).double(), []

    def judged(x: Tensor, told: Condition, draws: Draws, graded: bool = True) -> Tensor:
        seen.append((torch.equal(x, sample), graded))
        return torch.full((4,), -1.5 if torch.equal(x, sample) else 0.5)

    method.judged = judged
    method.rollout = lambda *_: sample
    carry: dict[str, Any] = {}
    out = method("student", latents(method, Draws(0, 0, range(4))), progress(), carry)
    assert out["adversarial"].item() == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-6)
    out = method("fake_score", latents(method, Draws(0, 0, range(4))), progress(), carry)
    expected = math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.5))
    assert out["critic"].item() == pytest.approx(expected, rel=1e-6)
    assert seen == [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("side", "levels", "convolutions"), [(64, 4, 3), (8, 2, 2), (32, 1, 5)])
def test_the_head_ends_in_one_logit_of_any_side(side: int, levels: int, convolutions: int) -> None:
    """Stable Diffusion's 8 x 8 features: 4 x 4 with stride 2, 4 x 4 to one pixel, 1 x 1, as the official head."""
    widths = (16,) * levels
    network = UNet2DConditionModel(
        sample_size=side, block_out_channels=widths, layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels, attention_head_dim=8,
    )  # fmt: skip
    head = head_of(network)
    middle = side // 2 ** (levels - 1)
    assert head(torch.randn(3, 16, middle, middle)).shape == (3, 1, 1, 1)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in head) == convolutions


def test_what_does_not_fit_is_refused(tiny_pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"method.gan_weight: a Affine has no middle block"):
        built(DMD2, straight(Affine(*TEACHER)))
    with pytest.raises(UserError, match=r"method.min_share: 0.9 is not below method.max_share 0.5"):
        built(DMD2, straight(Affine(*TEACHER)), min_share=0.9, max_share=0.5)
    with pytest.raises(UserError, match=r"student.init: scratch: a LoRA needs the teacher's weights"):
        tiny(tiny_pipeline, StudentSettings(kind="lora", init="scratch"))
    with pytest.raises(UserError, match=r"student.init: scratch: no stock pipeline samples a text network"):
        tiny(tiny_pipeline, StudentSettings(init="scratch"))
