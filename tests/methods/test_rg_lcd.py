"""The reward term: where its gradient goes, its closed form, and Ctrl-U's weighting of it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.rg_lcd import RGLCD
from fewstep.distill.methods.latent_consistency.settings import CtrlUSettings
from fewstep.distill.scorers.rewards import Reward
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Progress
from torch import Tensor, nn

from .test_lcd import CAPTIONS, batch_of

Build = Callable[..., RGLCD]
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8)
COLOURS = torch.tensor([0.5, 0.3, 0.2])


def turn(method: Any, seed: int = 1, iteration: int = 0) -> dict[str, Tensor]:
    batch = batch_of(method, Draws(seed, 2, range(6)))
    return method("student", batch, Progress(iteration, 10, {}), {})


def gradient(method: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, method.players()["student"])])


@pytest.mark.parametrize("student", [None, LORA])
def test_without_a_reward_it_is_lcd_bit_for_bit(
    student: StudentSettings | None, build_rg_lcd: Build, build_lcd: Callable[..., LCD]
) -> None:
    ours = build_rg_lcd(student=student, shake=0.05, reward_scale=0.0)
    theirs = build_lcd(student=student, shake=0.05)
    losses = [turn(m)["loss"] for m in (ours, theirs)]
    assert torch.equal(*losses)
    assert torch.equal(gradient(ours, losses[0]), gradient(theirs, losses[1]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_reward_is_that_of_the_decoded_prediction_and_pulls_on_the_student_alone(
    prediction: str, build_rg_lcd: Build
) -> None:
    """The gradient of the whole, less that of the distance, is -beta that of the reward, computed by hand."""
    method = build_rg_lcd(prediction=prediction, shake=0.05, reward_scale=3.0)
    out = turn(method)
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    pictures = method.teacher.vae.decode(step.prediction / 0.18215).sample / 2 + 0.5
    assert (pictures < 0).any() or (pictures > 1).any()
    reward = (pictures.clamp(0, 1).mean((2, 3)) * COLOURS).sum(1).mean()
    assert out["reward"].item() == pytest.approx(reward.item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx((out["distance"] - 3 * reward).item(), rel=1e-5)

    by_reward = gradient(method, reward)
    pulled = gradient(method, turn(method)["loss"]) - gradient(method, turn(method)["distance"])
    assert by_reward.norm() > 0
    assert (pulled + 3 * by_reward).norm() < 1e-3 * pulled.norm()
    turn(method)["loss"].backward()
    frozen = [p for m in [*method.teacher.modules(), method.reward] for p in m.parameters()]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert method.target is not None and all(not b.requires_grad for b in method.target.buffers())


class Nearness(Reward):
    """-|D(z) - y|^2 of the picture back in [-1, 1]."""

    best = 0.0

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return -(2 * images - 1 - self.y).square().flatten(1).sum(1)


class Free(nn.Module):
    """A consistency function whose output is a parameter where it is graded, and a given target elsewhere."""

    def __init__(self, start: Tensor, target: Tensor):
        super().__init__()
        self.prediction, self.aim = nn.Parameter(start.clone()), target

    def forward(self, z: Tensor, t: Tensor, condition: Any, weights: Any = None) -> Tensor:
        return self.prediction if torch.is_grad_enabled() else self.aim


def test_a_quadratic_reward_moves_the_prediction_to_its_closed_form(build_rg_lcd: Build) -> None:
    """min mean (p - a)^2 + beta mean_b |p - y|^2, n elements a sample: p = (a / n + beta y) / (1 / n + beta)."""
    y, aim = 0.3 * torch.randn(2, 6, 4, 8, 8).clamp(-2, 2)
    beta, n = 0.01, 4 * 8 * 8
    method = build_rg_lcd(reward=Nearness(y), distance="l2", reward_scale=beta, target_decay=None)
    method.teacher.decode = lambda z: z  # type: ignore[method-assign]
    method.function = Free(torch.zeros_like(aim), aim)  # type: ignore[assignment]
    for _ in range(3):  # Newton's steps: the loss is quadratic, with one curvature
        (slope,) = torch.autograd.grad(turn(method)["loss"], method.function.prediction)
        method.function.prediction.data -= slope / (2 / (6 * n) + 2 * beta / 6)
    expected = (aim / n + beta * y) / (1 / n + beta)
    torch.testing.assert_close(method.function.prediction.data, expected, rtol=1e-4, atol=1e-5)
    assert (expected - aim).norm() > 0.3 * aim.norm()


def ctrl_u(method: RGLCD, **settings: Any) -> RGLCD:
    chosen = CtrlUSettings(**settings)
    object.__setattr__(method.settings, "uncertainty", chosen)
    return method


def by_hand(method: RGLCD, pair: str, spread: float) -> dict[str, Tensor]:
    """Distance, cost, disagreement (B,) of the same draws, from the formulae."""
    step = method.step(batch_of(method, Draws(1, 2, range(6))))

    def reward(latents: Tensor) -> Tensor:
        pictures = (method.teacher.decode(latents) / 2 + 0.5).clamp(0, 1)
        return (pictures.mean((2, 3)) * COLOURS).sum(1)

    if pair == "target":
        other = reward(step.target).detach()
    else:
        abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        later = (step.t_hi + 1).clamp(max=999)
        a = abar[later.long()].view(-1, 1, 1, 1)
        z = a.sqrt() * step.z0 + (1 - a).sqrt() * step.eps
        other = reward(method.function(z, later, step.condition))
    mine = reward(step.prediction)
    return {"cost": 1 - mine, "other": 1 - other, "u": (mine - other).abs() / spread, "t": step.t_hi}


@pytest.mark.parametrize("pair", ["second_pass", "target"])
def test_ctrl_u_weighs_costs_by_the_disagreement_of_two_views(pair: str, build_rg_lcd: Build) -> None:
    method = ctrl_u(build_rg_lcd(shake=0.05, reward_scale=2.0), pair=pair, spread=5e-4, penalty=0.3)
    parts = by_hand(method, pair, 5e-4)
    assert parts["u"].max() > 0.1
    out = turn(method)
    extra = 2 * (parts["cost"] * (-parts["u"]).exp()).mean() + 0.3 * parts["u"].mean()
    assert out["loss"].item() == pytest.approx((out["distance"] + extra).item(), rel=1e-5)
    pulled = gradient(method, out["loss"]) - gradient(method, turn(method)["distance"])
    expected = gradient(method, extra)
    assert (pulled - expected).norm() < 1e-3 * expected.norm()


def test_one_view_is_the_plain_reward(build_rg_lcd: Build) -> None:
    """At T - 1 the second view is the first: U = 0, and the loss is the plain one up to a constant."""
    plain, weighted = build_rg_lcd(shake=0.05), ctrl_u(build_rg_lcd(shake=0.05))
    for method in (plain, weighted):
        method.training_times = lambda draws: (torch.full((6,), 999.0).double(), torch.full((6,), 979.0).double())  # type: ignore[method-assign]  # fmt: skip
    losses = [turn(m)["loss"] for m in (plain, weighted)]
    assert losses[1].item() == pytest.approx(losses[0].item() + 1, abs=1e-5)
    one, other = (gradient(m, loss) for m, loss in zip((plain, weighted), losses, strict=True))
    assert (one - other).norm() < 1e-4 * one.norm()


def test_ablations_gate_and_ramp(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(shake=0.05)
    parts = by_hand(method, "second_pass", 0.1)
    full = turn(ctrl_u(method))
    detached = turn(ctrl_u(method, weight="detached"))
    assert torch.equal(full["loss"], detached["loss"])
    assert not torch.equal(gradient(method, full["loss"]), gradient(method, detached["loss"]))
    uniform = turn(ctrl_u(method, weight="uniform"))
    both = (parts["cost"] + parts["other"]).mean() / 2
    assert (uniform["loss"] - uniform["distance"]).item() == pytest.approx(both.item(), rel=1e-5)

    inside = (parts["t"] >= 300) & (parts["t"] <= 700)
    assert 0 < inside.sum() < 6
    gated = turn(ctrl_u(method, t_min=300, t_max=700))
    kept = {k: parts[k][inside] for k in ("cost", "u")}
    extra = (kept["cost"] * (-kept["u"]).exp()).mean() + 0.1 * kept["u"].mean()
    assert (gated["loss"] - gated["distance"]).item() == pytest.approx(extra.item(), rel=1e-4)
    half = turn(ctrl_u(method, ramp_steps=6, penalty=0.0), iteration=3)
    whole = turn(ctrl_u(method, ramp_steps=6, penalty=0.0), iteration=6)
    ratio = (half["loss"] - half["distance"]) / (whole["loss"] - whole["distance"])
    assert ratio.item() == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(UserError, match=r"method\.uncertainty\.t_min: 9 is above t_max 3"):
        build_rg_lcd(uncertainty={"t_min": 9, "t_max": 3})


def test_samples_and_export_are_lcds(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(shake=0.05)
    export = method.export()
    export.model.set_progress_bar_config(disable=True)
    generators = [[torch.Generator().manual_seed(s) for s in (3, 8)] for _ in range(2)]
    ours = method.sample(CAPTIONS[:2], 4, 7.5, generators[0])
    theirs = export.model(
        CAPTIONS[:2], generator=generators[1], output_type="latent", **export.sampling["4"]
    ).images
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
