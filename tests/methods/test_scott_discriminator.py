"""The adversarial player: hinge losses, what its network computes, who learns in whose turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.losses import hinge_critic, hinge_generator
from fewstep.distill.methods.latent_consistency.scott import SCott
from fewstep.distill.models.discriminator import Discriminator
from fewstep.distill.planning.known_teachers import meta_teacher
from fewstep.distill.planning.published_teachers import SD15
from fewstep.distill.settings import LORA_TARGETS, StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Progress
from torch import Tensor, nn

from .test_lcd import CAPTIONS, batch_of

Build = Callable[..., SCott]
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8)


def turn(
    method: SCott, player: str = "student", carry: dict | None = None, iteration: int = 0
) -> dict[str, Tensor]:
    batch = batch_of(method, Draws(1, 2, range(6)))
    return method(player, batch, Progress(iteration, 10, {}), {} if carry is None else carry)


def test_hinge_losses_at_recorded_values() -> None:
    real, fake = torch.tensor([1.5, 0.2, -0.4, 2.0]), torch.tensor([-1.2, 0.3, -0.5, 1.1])
    assert hinge_critic(real, fake).item() == pytest.approx(1.525)
    assert hinge_generator(fake).item() == pytest.approx(0.075)
    assert 0.05 + 0.4 * hinge_generator(fake).item() == pytest.approx(0.08)


def plain_logits(
    method: SCott, folder: Path, x: Tensor, t: Tensor, prompts: Tensor
) -> tuple[Tensor, nn.Module]:
    """An own copy of the teacher's network with the LoRA added to its weights, cut before its last layers."""
    judge = method.discriminator
    assert judge is not None
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    own = dict(network.named_parameters())
    changed = set()
    for key in judge.down:
        name = key.replace("/", ".").replace(".base_layer", "")
        update = judge.up[key].detach() @ judge.down[key].detach()
        own[name].data += update.view_as(own[name])
        changed.add(name)
    assert all(name.startswith("up_blocks.") for name in changed) and len(changed) > 20
    network.conv_norm_out, network.conv_act = nn.Identity(), nn.Identity()
    network.conv_out = judge.head
    return network(x, t, encoder_hidden_states=prompts).sample, network


@pytest.mark.parametrize("student", [None, LORA])
def test_it_is_the_teachers_network_with_a_lora_in_the_decoder_and_a_new_last_layer(
    student: StudentSettings | None, build_scott: Build, tiny_pipeline: Path
) -> None:
    method = build_scott(student=student, shake=0.1)
    x, t = torch.randn(6, 4, 8, 8), torch.linspace(1, 999, 6).double()
    condition = method.teacher.condition(CAPTIONS)
    with torch.no_grad():
        ours = method.judged(x, {"t": t, "prompts": condition})
        theirs, _ = plain_logits(method, tiny_pipeline, x, t, condition.arguments["encoder_hidden_states"])
        other_time = method.judged(x, {"t": t.flip(0), "prompts": condition})
        untold = method.judged(x, {"t": t, "prompts": condition.null()})
    assert ours.shape == (6, 1, 8, 8)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    assert (other_time - ours).norm() > 1e-2 * ours.norm()
    assert (untold - ours).norm() > 1e-3 * ours.norm()


def test_it_starts_as_the_teacher_and_shares_its_weights(build_scott: Build, tiny_pipeline: Path) -> None:
    method = build_scott()
    judge = method.discriminator
    assert judge is not None
    assert all(not p.any() for p in judge.up.values()) and all(p.any() for p in judge.down.values())
    base = {id(p) for p in method.teacher.denoiser.network.parameters()}
    assert not base & {id(p) for p in method.parameters()}


def test_its_size_beside_stable_diffusion() -> None:
    """On LCM-LoRA's layers 4.7 % of the U-Net, on attention alone 0.8 %: the summaries' 3.6 % is neither."""
    with torch.device("meta"):
        network = meta_teacher(TeacherSettings("stable-diffusion-v1-5/stable-diffusion-v1-5"), SD15)
        unet = network.denoiser.network
        sizes = [
            sum(p.numel() for p in Discriminator(unet, 64, targets).parameters())
            for targets in (LORA_TARGETS, ("to_q", "to_k", "to_v", "to_out.0"))
        ]
    assert sizes == [39_984_577, 6_909_377]


@pytest.mark.parametrize("student", [None, LORA])
def test_in_the_students_turn_the_discriminator_passes_gradients_and_gets_none(
    student: StudentSettings | None, build_scott: Build
) -> None:
    plain, judged = (build_scott(student=student, shake=0.05, lambda_adv=v) for v in (0.0, 0.4))
    carry: dict[str, Any] = {}
    losses = [turn(plain)["loss"], (out := turn(judged, carry=carry))["loss"]]
    assert torch.equal(out["distance"], losses[0])
    assert losses[1].item() == pytest.approx((out["distance"] + 0.4 * out["adversarial"]).item())
    for loss in losses:
        loss.backward()
    gradients = [torch.cat([p.grad.flatten() for p in m.student.trained().values()]) for m in (plain, judged)]
    assert (gradients[1] - gradients[0]).norm() > 1e-2 * gradients[0].norm()
    assert judged.discriminator is not None
    assert all(p.grad is None and p.requires_grad for p in judged.discriminator.parameters())
    assert not any(v.requires_grad for v in carry.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("student", [None, LORA])
def test_in_its_own_turn_the_discriminator_alone_learns(
    student: StudentSettings | None, build_scott: Build, tiny_pipeline: Path
) -> None:
    """Real: the data's latents; fake: the prediction of the same step; both as the plain network sees them."""
    method = build_scott(student=student, shake=0.05)
    judge, carry = method.discriminator, {}
    assert judge is not None
    turn(method, carry=carry)
    before = {k: v.clone() for k, v in method.teacher.denoiser.network.state_dict().items()}
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    loss = turn(method, "discriminator", carry=carry)["loss"]
    prompts = step.prompts.arguments["encoder_hidden_states"]
    real, fake = (
        plain_logits(method, tiny_pipeline, x, step.t_hi, prompts)[0] for x in (step.z0, step.prediction)
    )
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    optimiser = torch.optim.AdamW(method.players()["discriminator"], 1e-2)
    loss.backward()
    weights = {k: p for k, p in judge.named_parameters() if not k.endswith("bias")}  # two hinges cancel there
    lacking = [k for k, p in weights.items() if p.grad is None or not p.grad.any()]
    assert not lacking, lacking
    assert all(p.grad is None for p in method.student.trained().values())
    optimiser.step()
    assert turn(method, "discriminator", carry=carry)["loss"] < loss
    after = method.teacher.denoiser.network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_it_is_listened_to_from_its_step_on(build_scott: Build) -> None:
    method = build_scott(shake=0.05, gan_start_step=3)
    early, late = turn(method, iteration=2), turn(method, iteration=3)
    assert torch.equal(early["loss"], early["distance"])
    assert late["loss"].item() == pytest.approx((late["distance"] + 0.4 * late["adversarial"]).item())
    assert method.turns(Progress(0, 10, {})) == ("student", "discriminator")


def test_renoised_sides_share_noise_and_time(build_scott: Build) -> None:
    method = build_scott(shake=0.05, renoise=True)
    carry: dict[str, Any] = {}
    turn(method, carry=carry)
    step = method.step(batch_of(method, Draws(1, 2, range(6))))
    assert not torch.equal(carry["t"], step.t_hi) and carry["noise"].std() > 0.9
    shown = method.process.noised(step.z0, carry["noise"], carry["t"])
    assert method.discriminator is not None
    with torch.no_grad():
        expected = method.discriminator(method.teacher.denoiser, shown, carry["t"], step.prompts)
        assert torch.equal(method.judged(carry["real"], carry), expected)
    assert carry["t"].min() >= 1 and carry["t"].max() <= 999


def test_gradient_checkpointing_does_not_reach_the_discriminators_pass(build_scott: Build) -> None:
    """Its recomputation would see the network's own weights."""
    gradients = []
    for checkpointing in (False, True):
        method = build_scott(student=LORA, shake=0.05)
        if checkpointing:
            method.student.network.enable_gradient_checkpointing()
        carry: dict[str, Any] = {}
        turn(method.train(), carry=carry)
        turn(method, "discriminator", carry=carry)["loss"].backward()
        assert method.student.network.is_gradient_checkpointing == checkpointing
        gradients.append(torch.cat([p.grad.flatten() for p in method.players()["discriminator"]]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_target_follows_after_the_students_turn_alone(build_scott: Build) -> None:
    method = build_scott(shake=0.05)
    assert method.target is not None
    for player, updates in (("discriminator", 0), ("student", 1)):
        method.after(player)
        assert int(method.target.updates) == updates


def test_its_optimiser_has_its_own_rate(build_scott: Build) -> None:
    method = build_scott(discriminator_lr=3e-5, discriminator_beta1=0.0)
    assert method.optimiser("discriminator") == {"lr": 3e-5, "betas": (0.0, 0.999)}
    assert method.optimiser("student") == {}


def test_the_student_alone_is_averaged(build_scott: Build) -> None:
    method = build_scott()
    student, judge = (method.players()[k] for k in ("student", "discriminator"))
    assert {id(p) for p in method.averaged().values()} == {id(p) for p in student}
    assert not {id(p) for p in student} & {id(p) for p in judge}
