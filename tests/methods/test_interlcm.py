"""InterLCM on the tiny LCM: losses by hand, calls, gradients, who plays when, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import fresh_from, seeded
from fewstep.distill.diffusion.guidance import guidance_embedding
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.degradation import Degradation
from fewstep.distill.methods.restoration.interlcm import InterLCM
from fewstep.distill.methods.restoration.settings import (
    DegradationSettings,
    InterLCMSettings,
    PatchSettings,
    VisualSettings,
)
from fewstep.distill.models.frozen import weights_hash
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.scorers.vision import ImageDistance, ImageEncoder, Vision
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.card_code import loading_lines
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
LIGHT = Degradation(kernel_size=3, blur=(0.1, 0.5), downsample=(1.0, 2.0))
EARLY, LATE = (Progress(i, 10, {"restorer": i, "discriminator": 0}) for i in (1, 2))


class Squares(ImageDistance):
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).square().mean((1, 2, 3))


class TinyVision(Vision):
    """A CLIP of 5 tokens and a plain distance."""

    def encoder(self, name: str) -> ImageEncoder:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            config = CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
                image_size=8,
            )  # fmt: skip
            return ImageEncoder(CLIPVisionModel(config), 8, (0.5,) * 3, (0.5,) * 3, 5)

    def distance(self, name: str) -> ImageDistance:
        return Squares()


def built(
    folder: Path, *, moved: bool = True, student: StudentSettings | None = None, **settings: Any
) -> InterLCM:
    """Whose ControlNet is no longer zero, if `moved`."""
    teacher = Teacher.load(TeacherSettings(str(folder)))
    torch.manual_seed(0)
    small = {
        "degradation": LIGHT, "visual": VisualSettings("tiny", (32, 32), 1), "gan_start_step": 2,
        "discriminator": PatchSettings(4, 1),
    }  # fmt: skip
    parts = Parts(teacher, student or StudentSettings(), [], vision=TinyVision())
    method = InterLCM(InterLCMSettings(**{**small, **settings}), parts)
    if moved and method.spatial is not None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in method.spatial.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return method.train()


def batch() -> Batch:
    return Batch(Draws(0, 0, range(3)), images=IMAGES)


def test_the_rollout_by_hand(lcm_pipeline: Path) -> None:
    """Spec, section 2, step for step, with diffusers' own networks: one noise a step, residuals of the noisy state and
    the degraded picture, the same tokens for both networks, w = 7 embedded."""
    method = built(lcm_pipeline, guidance_scale=8.0)
    out = method("restorer", batch(), EARLY, {})
    draws, teacher = Draws(0, 0, range(3)), method.teacher
    unet, vae = teacher.family.network, teacher.vae
    with torch.no_grad():
        lq = LIGHT(IMAGES, draws)
        assert method.visual is not None and method.image_encoder is not None and method.spatial is not None
        v = method.visual(method.image_encoder(lq))
        w = guidance_embedding(torch.full((3,), 7.0), 16)
        times, abar = (759, 499, 259), teacher.noise.abar.float()
        x0 = 0.18215 * vae.encode(lq).latent_dist.mean
        for t in times:
            x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * draws.normal((4, 8, 8))
            down, mid = method.spatial(x, t, v, lq, return_dict=False)
            eps = unet(
                x, t, v, timestep_cond=w, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample  # fmt: skip
            s = 10.0 * t
            c_skip, c_out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25) ** 0.5
            x0 = c_out * (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt() + c_skip * x
        restored = vae.decode(x0 / 0.18215).sample
        l1, far = (restored - IMAGES).abs().mean(), (restored - IMAGES).square().mean()
    assert out["l1"].item() == pytest.approx(l1.item(), rel=1e-4)
    assert out["perceptual"].item() == pytest.approx(far.item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx((l1 + far).item(), rel=1e-4)


def test_losses_and_their_weights(lcm_pipeline: Path) -> None:
    method = built(lcm_pipeline, l1_weight=2.0, perceptual_weight=3.0, gan_weight=0.5)
    carry: dict[str, Any] = {}
    out = method("restorer", batch(), LATE, carry)
    assert set(out) == {"loss", "l1", "perceptual", "adversarial"}
    parts = 2 * out["l1"] + 3 * out["perceptual"] + 0.5 * out["adversarial"]
    assert out["loss"].item() == pytest.approx(parts.item(), rel=1e-5)
    assert method.discriminator is not None
    with torch.no_grad():
        fake, real = method.discriminator(carry["restored"]), method.discriminator(IMAGES)
    assert out["adversarial"].item() == pytest.approx(-fake.mean().item(), rel=1e-4)
    critic = method("discriminator", batch(), LATE, carry)["loss"]
    assert critic.item() == pytest.approx(F.relu(1 - real).mean().item() + F.relu(1 + fake).mean().item())
    assert not carry["restored"].requires_grad
    assert (carry["restored"] - IMAGES).abs().mean().item() == pytest.approx(out["l1"].item(), rel=1e-5)


def test_published_weights() -> None:
    s = InterLCMSettings()
    assert (s.l1_weight, s.perceptual_weight, s.gan_weight, s.gan_start_step) == (1, 1, 0.1, 10001)
    assert s.degradation == DegradationSettings() and s.perceptual == "lpips-imagenet"
    assert (s.num_steps, s.start_index, s.discriminator) == (4, 1, PatchSettings(64, 4))
    assert s.visual == VisualSettings("openai/clip-vit-base-patch16", (128, 256, 512), 2)


@pytest.mark.parametrize(("num_steps", "calls"), [(4, [759, 499, 259]), (2, [499])])
def test_network_evaluations_and_gradients(num_steps: int, calls: list[int], lcm_pipeline: Path) -> None:
    """Every step's network has a graph; both encoders get a gradient, the frozen parts none."""
    method = built(lcm_pipeline, num_steps=num_steps)
    seen: dict[str, list[float]] = {"unet": [], "controlnet": []}
    graphs: list[bool] = []
    unet = method.teacher.family.network
    assert method.spatial is not None and method.visual is not None
    for name, network in (("unet", unet), ("controlnet", method.spatial)):
        network.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[1][0].item()))
    unet.register_forward_hook(lambda m, args, out: graphs.append(out[0].requires_grad))
    frozen = [*method.teacher.modules(), method.image_encoder]
    before = [weights_hash(m) for m in frozen]
    optimiser = torch.optim.AdamW(method.players()["restorer"], lr=1e-2)
    method("restorer", batch(), LATE, {})["loss"].backward()
    assert seen == {"unet": calls, "controlnet": calls} and graphs == [True] * len(calls)
    for encoder in (method.visual, method.spatial):
        norms = [0.0 if p.grad is None else p.grad.norm().item() for p in encoder.parameters()]
        assert sum(n > 0 for n in norms) > 0.9 * len(norms)
    optimiser.step()
    assert [weights_hash(m) for m in frozen] == before
    assert all(p.grad is None for m in frozen for p in m.parameters())
    assert method.discriminator is not None
    assert all(p.grad is None for p in method.discriminator.parameters())


def test_the_gradient_is_that_of_the_whole_trajectory(lcm_pipeline: Path) -> None:
    """Against a finite difference along one direction of both encoders: no step, noise or decoder is cut off."""
    method = built(lcm_pipeline)
    for module in (method, *method.teacher.modules()):
        module.double()
    parameters = method.players()["restorer"]
    direction = [torch.randn_like(p) for p in parameters]
    size = sum(d.square().sum() for d in direction).sqrt()

    def loss() -> Tensor:
        noise, lq = Draws(0, 0, range(3)), IMAGES.double()
        restored = method.restored(lq, lambda x: noise.normal(x.shape[1:]).double())
        return (restored - IMAGES).abs().mean()

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None) / size
    values, h = [], 1e-4
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * h * d / size)
            values.append(loss())
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(sign * h * d / size)
    assert slope.item() == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=2e-3)
    assert abs(slope.item()) > 1e-6


def test_who_plays_when(lcm_pipeline: Path) -> None:
    """The discriminator from gan_start_step on; before that it costs the restorer nothing."""
    method = built(lcm_pipeline, discriminator_lr=3e-4)
    assert method.turns(EARLY) == ("restorer",) and method.turns(LATE) == ("restorer", "discriminator")
    assert "adversarial" not in method("restorer", batch(), EARLY, {})
    assert method.optimiser("discriminator") == {"lr": 3e-4} and method.optimiser("restorer") == {}
    players = method.players()
    trained = {p for p in method.parameters() if p.requires_grad}
    assert {p for group in players.values() for p in group} == trained
    assert {p for m in (method.visual, method.spatial) for p in m.parameters()} == set(players["restorer"])
    assert set(method.averaged().values()) == set(players["restorer"])
    alone = built(lcm_pipeline, gan_weight=0.0)
    assert set(alone.players()) == {"restorer"} and alone.turns(LATE) == ("restorer",)


def test_either_encoder_alone(lcm_pipeline: Path) -> None:
    spatial = built(lcm_pipeline, visual=None)
    empty = spatial.teacher.encode_empty()["encoder_hidden_states"]
    assert torch.equal(spatial.condition(IMAGES).arguments["encoder_hidden_states"], empty.expand(3, -1, -1))
    assert set(spatial.players()["restorer"]) == set(spatial.spatial.parameters())
    assert spatial("restorer", batch(), LATE, {})["loss"].requires_grad
    visual = built(lcm_pipeline, spatial=False)
    assert set(visual.players()["restorer"]) == set(visual.visual.parameters())
    visual("restorer", batch(), LATE, {})["loss"].backward()
    assert all(p.grad is not None for p in visual.visual.parameters())
    assert built(lcm_pipeline, perceptual_weight=0.0).perceptual is None


def test_checkpointing_reaches_what_gradients_pass(lcm_pipeline: Path) -> None:
    """The same gradients with every network recomputed."""
    grads = []
    for recomputed in (False, True):
        method = built(lcm_pipeline)
        if recomputed:
            for network in (*method.passed_through(), method.spatial, method.visual):
                network.enable_gradient_checkpointing()
        loss = method("restorer", batch(), LATE, {})["loss"]
        grads.append(torch.autograd.grad(loss, method.players()["restorer"], allow_unused=True))
    assert {m for m in method.passed_through()} == {method.teacher.family.network, method.teacher.vae}
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parts", ["both", "spatial", "visual"])
def test_the_exported_pipeline_makes_the_same_picture(parts: str, lcm_pipeline: Path) -> None:
    settings = {"spatial": {"visual": None}, "visual": {"spatial": False}}.get(parts, {})
    method = built(lcm_pipeline, **settings).eval()
    export = method.export()
    assert list(export.sampling) == ["3"]
    pipe, call = export.model, export.sampling["3"]
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = (method.restored(IMAGES, fresh_from(seeded(3, 7))) / 2 + 0.5).clamp(0, 1)
    made = pipe(IMAGES / 2 + 0.5, generator=seeded(3, 7), output_type="pt", **call).images
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
    assert (pipe.controlnet is None) == (parts == "visual")
    assert (pipe.visual_encoder is None) == (parts == "spatial") == (pipe.text_encoder is not None)
    if parts == "both":
        with pytest.raises(ValueError, match="prompt: this restorer is told the picture's tokens"):
            pipe(IMAGES / 2 + 0.5, prompt="red cat")
        lines = loading_lines(export)
        assert 'degraded = load_image("degraded.png")' in lines
        assert "pipe(degraded, timesteps=[999, 759, 499, 259], start_index=1, guidance_scale=8.5" in lines
        rows = method.pictures(["red cat", "dog"], seed=0)
        assert {k: tuple(v.shape) for k, v in rows.items()} == dict.fromkeys(
            ("student", "degraded", "restored"), (2, 3, 16, 16)
        )
        assert torch.equal(rows["restored"], method.pictures(["red cat", "dog"], seed=0)["restored"])


def test_what_does_not_fit_is_refused(lcm_pipeline: Path, tiny_families: Any) -> None:
    for message, options in (
        (r"student: the few-step student is frozen", {"student": StudentSettings(kind="lora")}),
        (r"method.spatial: false leaves nothing to train", {"visual": None, "spatial": False}),
        (r"method.start_index: 4 is not in 1..3", {"start_index": 4}),
        (r"method.degradation.jpeg", {"degradation": Degradation(jpeg=(0, 50))}),
        (r"method.visual.channels: \[24\] are no multiples of 32", {"visual": VisualSettings("t", (24,))}),
        (r"method.discriminator.layers: 4 leave nothing of 16", {"discriminator": PatchSettings(4, 4)}),
    ):
        with pytest.raises(UserError, match=message):
            built(lcm_pipeline, **options)
    with pytest.raises(UserError, match=r"is told more than one text"):
        built(tiny_families("sdxl"))


def test_a_condition_of_its_own_has_no_prompt(lcm_pipeline: Path) -> None:
    method = built(lcm_pipeline)
    told = method.condition(IMAGES)
    assert isinstance(told, Condition) and set(told.arguments) == {"encoder_hidden_states"}
    assert told.arguments["encoder_hidden_states"].shape == (3, 12, 16)
    other = method.condition(-IMAGES).arguments["encoder_hidden_states"]
    assert (told.arguments["encoder_hidden_states"] - other).abs().max() > 1e-3
