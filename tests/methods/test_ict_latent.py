"""Consistency training in a latent diffusion teacher's latents: its view in EDM's process, losses, reach, export."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from fewstep.distill.diffusion.denoiser import DenoiserView
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.errors import UserError
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.space import LatentSpace
from fewstep.distill.settings import StudentSettings
from fewstep.pipelines.pipeline_latent_cm import LatentCMPipeline
from torch import Tensor, nn

from .ict_parts import (
    CAPTIONS,
    GREY,
    LATENT,
    Function,
    at,
    consistency,
    copied,
    gradients,
    heun,
    latent_batch,
    latent_ict,
    latent_teacher,
    levels,
    shaken,
    step,
)

SCRATCH = StudentSettings(init="scratch")
SD, LOW, HIGH = LATENT["sigma_data"], LATENT["sigma_min"], LATENT["sigma_max"]


def abar() -> Tensor:
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)


def vp_denoiser(network: nn.Module, kind: str, states: Tensor) -> Function:
    """x0 of the noise-predicting network at x / sqrt(1 + sigma^2) and the time of that noise level, written out."""
    table = (abar() / (1 - abar())).log()

    def denoise(x: Tensor, s: Tensor) -> Tensor:
        time = np.interp(2 * s.flatten().log().numpy(), -table, np.arange(1000.0))
        cut = s.clamp((-table[0] / 2).exp(), (-table[-1] / 2).exp())  # it has seen no other levels
        a, b = (1 / (1 + cut**2).sqrt()).float(), (cut / (1 + cut**2).sqrt()).float()
        z = x * torch.where(s > 1, b / s, a).float()
        o = network(z, torch.tensor(time).float(), encoder_hidden_states=states).sample
        return {"epsilon": (z - b * o) / a, "v_prediction": a * z - b * o, "sample": o}[kind]

    return denoise


def boundary_of(denoise: Function) -> Function:
    """f of a denoiser: F = (D - c_skip' x) / c_out' put into c_skip x + c_out F."""

    def function(x: Tensor, s: Tensor) -> Tensor:
        d = denoise(x, s)
        output = (d - (SD**2 / (s**2 + SD**2)).float() * x) / (s * SD / (s**2 + SD**2).sqrt()).float()
        c_skip, c_out = SD**2 / ((s - LOW) ** 2 + SD**2), SD * (s - LOW) / (s**2 + SD**2).sqrt()
        return c_skip.float() * x + c_out.float() * output

    return function


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_view_of_a_variance_preserving_teacher_is_its_network_evaluated_by_hand(
    kind: str, tiny_pipeline: Path
) -> None:
    teacher = latent_teacher(tiny_pipeline, kind)
    condition = teacher.condition(CAPTIONS)
    view = DenoiserView(teacher.denoiser, EDM(0.01, 30.0))
    sigma = torch.tensor([0.01, 0.03, 0.9, 1.1, 14.6, 30.0], dtype=torch.float64)
    x = sigma.float().view(-1, 1, 1, 1) * torch.randn(6, 4, 8, 8) + torch.randn(6, 4, 8, 8)
    by_hand = vp_denoiser(teacher.pipeline.unet, kind, condition.arguments["encoder_hidden_states"])
    with torch.no_grad():
        seen, expected = view(x, sigma, condition), by_hand(x, sigma.view(-1, 1, 1, 1))
    least = (1 / abar()[0] - 1).sqrt()  # where the network's noise begins
    by_hand_eps = (x - expected) / sigma.clamp(min=least).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen.x0, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.eps, by_hand_eps, rtol=1e-3, atol=1e-3)


def latents(method: ICT) -> tuple[Tensor, Tensor, Draws]:
    """x0, its prompts' states, and the draws after its posterior's."""
    batch, draws = latent_batch(method), Draws(5, 0, range(6))
    assert batch.latents is not None and batch.condition is not None
    mean, logvar = batch.latents.chunk(2, dim=1)
    x0 = 0.18215 * (mean + (logvar / 2).exp() * draws.normal((4, 8, 8)))
    return x0, batch.condition.arguments["encoder_hidden_states"], draws


def neighbours(draws: Draws, num_points: int) -> tuple[Tensor, Tensor]:
    sigmas = levels(num_points, LOW, HIGH)
    index = num_points - 2 - draws.integers(0, num_points - 1)
    return sigmas[index].view(-1, 1, 1, 1), sigmas[index + 1].view(-1, 1, 1, 1)


def assert_same(method: ICT, expected: Tensor, own: nn.Module, loss: Tensor) -> None:
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = {k: p.grad for k, p in own.named_parameters()}
    largest = max(g.norm() for g in gradients(method).values())
    for name, gradient in gradients(method).items():
        assert (gradient - reference[name]).norm() < 1e-3 * gradient.norm() + 1e-5 * largest, name


@pytest.mark.parametrize(("kind", "guidance"), [("epsilon", 1.0), ("epsilon", 2.5), ("v_prediction", 4.0)])
def test_distillation_of_a_guided_teacher(kind: str, guidance: float, tiny_pipeline: Path) -> None:
    settings: dict[str, Any] = {
        "ode_source": "teacher", "target": "ema", "curriculum": "constant", "noise": "uniform", "distance": "l1",
        "weighting": "uniform",
    }  # fmt: skip
    method = shaken(
        latent_ict(tiny_pipeline, prediction=kind, guidance_scale=guidance, **settings), size=0.02
    )
    loss = step(method, latent_batch(method))["loss"]
    assert method.target is not None
    own, target = copied(method.student.network), copied(method.student.network, method.target.tensors())
    teacher = latent_teacher(tiny_pipeline, kind)
    x0, states, draws = latents(method)
    empty = teacher.encode_prompts([""])["encoder_hidden_states"].expand_as(states)
    high, low = neighbours(draws, 18)
    x_hi = x0 + high.float() * draws.normal((4, 8, 8))
    told, untold = (vp_denoiser(teacher.pipeline.unet, kind, c) for c in (states, empty))
    y = boundary_of(vp_denoiser(own, kind, states))(x_hi, high)
    with torch.no_grad():
        x_lo = heun(lambda x, s: untold(x, s) + guidance * (told(x, s) - untold(x, s)), x_hi, high, low)
        aim = boundary_of(vp_denoiser(target, kind, states))(x_lo, low)
    assert_same(method, (y - aim).abs().mean(), own, loss)


@pytest.mark.parametrize("student", ["scratch", "teacher"])
def test_training_from_data_in_latents(student: str, tiny_pipeline: Path) -> None:
    """From scratch the network is EDM's F; from the teacher's weights it stays what it was, seen through the view."""
    method = latent_ict(tiny_pipeline, student=SCRATCH if student == "scratch" else None)
    loss = step(method, latent_batch(method))["loss"]
    own = copied(method.student.network)
    x0, states, draws = latents(method)
    sigmas = levels(11, LOW, HIGH).flip(0)
    edges = torch.erf((sigmas.log() + 1.1) / (2 * 2**0.5))
    p = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    index = (draws.uniform().double()[:, None] >= p.cumsum(0)).sum(1)
    low, high = sigmas[index].view(-1, 1, 1, 1), sigmas[index + 1].view(-1, 1, 1, 1)
    z = draws.normal((4, 8, 8))

    def scratch(x: Tensor, time: Tensor) -> Tensor:
        return own(x, time, encoder_hidden_states=states).sample

    f = {
        "scratch": consistency(scratch, LOW, SD),
        "teacher": boundary_of(vp_denoiser(own, "epsilon", states)),
    }
    y = f[student](x0 + high.float() * z, high)
    with torch.no_grad():
        aim = f[student](x0 + low.float() * z, low)
    c = 0.00054 * 256**0.5
    d = ((y - aim).square().sum((1, 2, 3)) + c**2).sqrt() - c
    assert_same(method, (d / (high - low).float().flatten()).mean(), own, loss)


def test_ect_from_the_teachers_weights_has_no_shift_of_the_boundary(tiny_pipeline: Path) -> None:
    method = latent_ict(tiny_pipeline, curriculum="continuous", huber_c=0)
    loss = step(method, latent_batch(method), at(100))["loss"]
    own = copied(method.student.network)
    x0, states, draws = latents(method)
    t = (-1.1 + 2 * draws.normal(()).double()).exp().clamp(LOW, HIGH).view(-1, 1, 1, 1)
    r = t * (1 - (1 + 8 / (1 + t.exp())) / 8)
    clean = r < LOW
    r = torch.where(clean, 0.0, r)
    z = draws.normal((4, 8, 8))
    denoise = vp_denoiser(own, "epsilon", states)
    y = denoise(x0 + t.float() * z, t)
    with torch.no_grad():
        seen = denoise(x0 + r.float() * z, torch.where(clean, t, r))
        aim = torch.where(clean, x0, seen)
    d = (y - aim).square().sum((1, 2, 3)).sqrt()
    assert_same(method, (d / (t - r).float().flatten()).mean(), own, loss)


def test_continuous_pairs_stay_within_the_teachers_levels(tiny_pipeline: Path) -> None:
    """11 % of the lognormal draws are below Stable Diffusion's first level: their weight 1 / (t - r) would rule."""
    method = latent_ict(tiny_pipeline, curriculum="continuous", huber_c=0)
    r, t = method.pairs(SimpleNamespace(draws=Draws(0, 0, range(400))), at(100))
    assert [t.min().item(), t.max().item()] == pytest.approx([LOW, HIGH], rel=1e-9)
    assert 20 < (t == t.min()).sum() < 70 and (t == t.max()).sum() > 3
    assert ((r == 0) | (r >= LOW)).all() and (r[t == t.min()] == 0).all()


def test_a_student_from_scratch_has_the_teachers_architecture_and_new_weights(tiny_pipeline: Path) -> None:
    torch.manual_seed(1)  # not the teacher's own
    method = latent_ict(tiny_pipeline, student=SCRATCH)
    teacher = method.parts.need_teacher().denoiser.network
    assert isinstance(method.student.network, UNet2DConditionModel) and method.student.denoiser.kind == "edm"
    ours, theirs = method.student.network.state_dict(), teacher.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert not any(torch.equal(ours[k], theirs[k]) for k in ours if ours[k].ndim > 1)
    assert method.function.denoiser is method.student.denoiser
    assert isinstance(method.space, LatentSpace) and method.needs == {"latents", "prompts"}


def test_levels_beyond_the_teachers_reach_are_refused_where_the_teacher_is_asked(tiny_pipeline: Path) -> None:
    """Its noise goes from 0.0292 to 14.61; a network from scratch that learns from data has no such ends."""
    for settings in ({"sigma_min": 0.029}, {"sigma_max": 14.7}, {"sigma_min": 0.002, "sigma_max": 80.0}):
        for student, source in ((None, "data"), (SCRATCH, "teacher")):
            with pytest.raises(
                UserError, match=r"teacher's noise goes from 0\.02917 to 14\.61; set them"
            ) as caught:
                latent_ict(tiny_pipeline, student=student, ode_source=source, **settings)
            assert "\n" not in str(caught.value)
        assert latent_ict(tiny_pipeline, student=SCRATCH, **settings).process.t_range[0] < 0.0301


def test_a_network_that_does_not_fit_the_latents_is_refused(tiny_pipeline: Path) -> None:
    teacher = latent_teacher(tiny_pipeline)
    fitting = {k: v for k, v in teacher.pipeline.unet.config.items() if not k.startswith("_")}
    fitting["_class_name"] = "UNet2DConditionModel"
    for network, message in (
        (GREY, r"student\.network: a UNet2DModel is told no prompts; latents need _class_name"),
        ({**fitting, "in_channels": 3}, r"student\.network\.in_channels: 3, but the teacher has 4"),
        ({**fitting, "sample_size": 16}, r"student\.network\.sample_size: 16, but the teacher has 8"),
        (
            {**fitting, "cross_attention_dim": 8},
            r"student\.network\.cross_attention_dim: 8, but the teacher has 16",
        ),
    ):
        with pytest.raises(UserError, match=message):
            latent_ict(tiny_pipeline, student=StudentSettings(init="scratch", network=network))
    narrow = {**fitting, "block_out_channels": (8, 16)}
    method = latent_ict(tiny_pipeline, student=StudentSettings(init="scratch", network=narrow))
    assert step(method, latent_batch(method))["loss"].item() > 0
    assert method.student.network.config.block_out_channels == (8, 16)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "scratch"])
def test_the_exported_pipeline_gives_the_methods_samples(kind: str, tiny_pipeline: Path) -> None:
    scratch = kind == "scratch"
    method = latent_ict(
        tiny_pipeline, prediction="epsilon" if scratch else kind, student=SCRATCH if scratch else None
    )
    shaken(method, size=0.02).eval()
    export = method.export()
    assert isinstance(export.model, LatentCMPipeline) and export.sampling == method.calls()
    assert (
        export.model.noise_schedule is None
    ) == scratch and not export.model.scheduler.config.clip_denoised
    export.model.set_progress_bar_config(disable=True)
    prompts = CAPTIONS[:2]
    for steps in ("1", "2"):
        ours = method.sample(prompts, int(steps), seeded(2, 3))
        call = {"generator": seeded(2, 3), **export.sampling[steps]}
        theirs = export.model(prompts, output_type="latent", **call).images
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
        pictures = (method.space.decode(ours) / 2 + 0.5).clamp(0, 1)
        decoded = export.model(prompts, output_type="pt", **{**call, "generator": seeded(2, 3)}).images
        assert (pictures - decoded).abs().max() < 1e-5 and pictures.std() > 0.01


def test_latents_are_exported_with_the_teachers_own_schedule(tiny_pipeline: Path) -> None:
    export = latent_ict(tiny_pipeline).export()
    assert isinstance(export.model.noise_schedule, DDIMScheduler)
    c = export.model.scheduler.config
    assert (c.sigma_min, c.sigma_max, c.sigma_data, c.num_train_timesteps) == (LOW, HIGH, SD, 1281)
