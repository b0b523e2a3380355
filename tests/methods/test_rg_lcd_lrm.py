"""The latent proxy's players: who learns what, from which pairs, in which order."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.rg_lcd import RGLCD
from fewstep.distill.scorers.rewards import Reward
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Progress
from torch import Tensor, nn

from .test_lcd import CAPTIONS, batch_of

Build = Callable[..., RGLCD]
LRM = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "patch_size": 2, "embed_dim": 8, "text_layers": 1,
       "pretrain_steps": 2, "batch_size": 4}  # fmt: skip
SCALING_FACTOR = 0.18215


def turn(
    method: RGLCD, player: str = "student", carry: dict | None = None, seed: int = 1
) -> dict[str, Tensor]:
    batch = batch_of(method, Draws(seed, 2, range(6)))
    return method(player, batch, Progress(5, 10, {}), {} if carry is None else carry)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


class Noted(Reward):
    """Prefers dark pictures by as much as the caption is long; keeps what it was asked."""

    best = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, list[str]]] = []

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        raise AssertionError("the proxy stands in for the reward")

    def logits(self, images: Tensor, captions: Sequence[str], scale: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append((images, list(captions)))
        lengths = torch.tensor([float(len(c)) for c in captions])
        return -lengths * images.mean((1, 2, 3))


def test_players_and_turns(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(lrm=LRM)
    assert method.lrm is not None
    players = method.players()
    assert list(players) == ["student", "latent_clip", "lrm"]
    assert {id(p) for p in method.averaged().values()} == {id(p) for p in players["student"]}
    assert len(players["latent_clip"]) == len(list(method.lrm.parameters())) > len(players["lrm"])
    assert not {id(p) for p in players["student"]} & {id(p) for p in players["latent_clip"]}
    seen = [method.turns(Progress(i, 4, {})) for i in range(4)]
    assert seen == [("latent_clip",)] * 2 + [("student", "lrm")] * 2
    assert method.optimiser("lrm") == {"lr": 3.3e-6} and method.optimiser("latent_clip") == {"lr": 5e-4}
    with pytest.raises(UserError, match=r"method\.lrm\.pretrain_steps: 2 leaves the student none of the 2"):
        method.turns(Progress(0, 2, {}))
    assert build_rg_lcd().turns(Progress(0, 2, {})) == ("student",)


def test_the_student_is_rewarded_by_the_proxys_cosine_of_unscaled_latents(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(lrm=LRM, shake=0.05, reward_scale=2.0, reward=Noted())
    assert method.lrm is not None
    out = turn(method)
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    images = F.normalize(method.lrm.vision(step.prediction / SCALING_FACTOR), dim=1)
    states = step.prompts.arguments["encoder_hidden_states"]
    reward = (images * method.lrm.text_vectors(states)).sum(1)
    assert out["reward"].item() == pytest.approx(reward.mean().item(), abs=1e-6)
    assert out["loss"].item() == pytest.approx((out["distance"] - 2 * reward.mean()).item(), abs=1e-6)
    plain = build_rg_lcd(lrm=LRM, shake=0.05, reward_scale=0.0, reward=Noted())
    for m in (method, plain):
        turn(m)["loss"].backward()
        assert gradients(m.lrm) == {} and all(p.requires_grad for p in m.lrm.parameters())
    ours, theirs = gradients(method.student), gradients(plain.student)
    assert max((ours[k] - theirs[k]).norm() / theirs[k].norm() for k in ours) > 0.05


@pytest.mark.parametrize("student", [None, StudentSettings(kind="lora", rank=4)])
def test_the_proxy_learns_the_experts_preferences_among_prediction_target_and_data(
    student: StudentSettings | None, build_rg_lcd: Build
) -> None:
    """The first rows of the batch, each with its own caption; the expert sees decoded pictures without a graph."""
    expert = Noted()
    method = build_rg_lcd(student=student, lrm=LRM, shake=0.05, reward=expert)
    assert method.lrm is not None
    carry: dict[str, Any] = {}
    turn(method, carry=carry)
    assert not carry["candidates"].requires_grad
    out = turn(method, "lrm", carry)
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    candidates = [x[:4].detach() for x in (step.prediction, step.target, step.z0)]
    assert len(expert.asked) == 3
    for (pictures, captions), latents in zip(expert.asked, candidates, strict=True):
        assert captions == CAPTIONS[:4]
        decoded = method.teacher.vae.decode(latents / SCALING_FACTOR).sample
        torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)

    states = step.prompts.arguments["encoder_hidden_states"][:4]
    scale = method.lrm.log_scale.exp()
    given = [scale * method.lrm(x / SCALING_FACTOR, states) for x in candidates]
    wanted = [
        -torch.tensor([float(len(c)) for c in CAPTIONS[:4]]) * p.mean((1, 2, 3)) for p, _ in expert.asked
    ]
    expected = torch.zeros(())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p, q = torch.sigmoid(wanted[i] - wanted[j]), torch.sigmoid(given[i] - given[j])
        expected = expected + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    out["loss"].backward()
    locked = {id(p) for p in method.lrm.locked()}
    assert all((p.grad is None) == (id(p) in locked) for p in method.lrm.parameters())
    assert all(p.requires_grad for p in method.lrm.parameters())
    assert gradients(method.student) == {}


def test_contrastive_training_is_of_the_datas_latents_and_all_weights(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(lrm=LRM)
    assert method.lrm is not None
    batch = batch_of(method, Draws(1, 2, range(6)))
    loss = turn(method, "latent_clip")["loss"]
    assert batch.latents is not None
    mean, logvar = batch.latents.chunk(2, dim=1)
    latents = mean + (logvar / 2).exp() * Draws(1, 2, range(6)).normal(mean.shape[1:])
    prompts = method.teacher.condition(CAPTIONS).arguments["encoder_hidden_states"]
    logits = method.lrm.image_vectors(latents) @ method.lrm.text_vectors(prompts).T / 0.07
    own = torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in method.lrm.parameters()) and gradients(method.student) == {}


def test_the_proxy_comes_to_agree_with_its_expert(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(lrm={**LRM, "unlocked_vision_layers": 2, "batch_size": 6}, shake=0.05)
    carry: dict[str, Any] = {}
    turn(method, carry=carry)
    optimiser = torch.optim.Adam(method.players()["lrm"], 3e-3)
    losses = []
    for _ in range(40):
        out = turn(method, "lrm", carry)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.2 * losses[0] and out["pair_accuracy"] > 0.85


def test_ctrl_u_works_on_the_proxys_scores(build_rg_lcd: Build) -> None:
    method = build_rg_lcd(
        lrm=LRM, shake=0.05, reward=Noted(), uncertainty={"pair": "target", "spread": 0.01, "penalty": 0.2}
    )
    assert method.lrm is not None
    out = turn(method)
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    states = step.prompts.arguments["encoder_hidden_states"]
    mine, other = (method.lrm(x / SCALING_FACTOR, states) for x in (step.prediction, step.target))
    u = (mine - other).abs() / 0.01
    extra = ((1 - mine) * (-u).exp()).mean() + 0.2 * u.mean()
    assert (out["loss"] - out["distance"]).item() == pytest.approx(extra.item(), rel=1e-4)
