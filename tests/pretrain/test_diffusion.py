"""The denoising loss against the formula written out, with the same random numbers."""

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.pretrain.diffusion import Diffusion
from fewstep.distill.pretrain.settings import DiffusionSettings
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress

ROWS = range(6)


@pytest.fixture
def teacher(tiny_pipeline):
    return Teacher.load(TeacherSettings(path=str(tiny_pipeline)))


def batch_for(teacher):
    posterior = torch.randn(len(ROWS), 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(Draws(0, 3, ROWS), latents=posterior, condition=teacher.condition(["cat", "dog", "red"] * 2))


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_is_the_weighted_epsilon_error(teacher, gamma, dropout):
    method = Diffusion(
        DiffusionSettings(caption_dropout=dropout, snr_gamma=gamma), Parts(teacher, StudentSettings(), [])
    )
    batch = batch_for(teacher)
    loss = method("student", batch, Progress(0, 1, {}), {})["loss"]

    draws = Draws(0, 3, ROWS)
    mean, logvar = batch.latents.chunk(2, dim=1)
    x0 = (mean + logvar.div(2).exp() * draws.normal(mean.shape[1:])) * teacher.vae.config.scaling_factor
    t = draws.integers(0, 1000)
    eps = draws.normal(x0.shape[1:])
    dropped = draws.uniform() < dropout
    states = batch.condition.arguments["encoder_hidden_states"].clone()
    states[dropped] = teacher.encode_prompts([""])["encoder_hidden_states"]
    abar = teacher.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    with torch.no_grad():
        output = teacher.pipeline.unet(x_t, t, states).sample
    snr = abar / (1 - abar)
    weight = 1.0 if gamma is None else snr.clamp(max=gamma) / snr
    torch.testing.assert_close(loss, (weight * (output - eps) ** 2).mean(), rtol=2e-5, atol=1e-6)
    assert dropped.any() == (dropout > 0)


def test_gradient_reaches_the_student_alone(teacher):
    method = Diffusion(DiffusionSettings(), Parts(teacher, StudentSettings(), []))
    method("student", batch_for(teacher), Progress(0, 1, {}), {})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.players()["student"])
    assert all(p.grad is None for module in teacher.modules() for p in module.parameters())


def test_pictures_come_from_the_same_noise_every_time(teacher):
    method = Diffusion(DiffusionSettings(), Parts(teacher, StudentSettings(), []))
    first, again, other = (method.pictures(["cat", "dog"], seed)["20 steps"] for seed in (0, 0, 5))
    assert first.shape == (2, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
