"""The latent consistency distillation loss against a plain second implementation, and where its gradient goes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.guidance import guidance_embedding
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Progress
from peft import LoraConfig
from torch import Tensor, nn

Build = Callable[..., LCD]
SCALING_FACTOR = 0.18215
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8)
CAPTIONS = ["red cat", "dog", "cat", "red dog", "a red red dog", "go"]
INDEX = [0, 1, 7, 13, 23, 24]


class Known(Draws):
    """Draws whose levels are given and whose other numbers are kept for the second implementation."""

    def __init__(self, rows: range, index: list[int], high: int):
        super().__init__(5, 0, rows)
        self.index, self.high = torch.tensor(index), high
        self.normals: list[Tensor] = []
        self.uniforms: list[Tensor] = []
        self.bounds: list[tuple[float, float]] = []

    def normal(self, shape: Any) -> Tensor:
        self.normals.append(super().normal(shape))
        return self.normals[-1]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        self.bounds.append((low, high))
        self.uniforms.append(super().uniform(low, high))
        return self.uniforms[-1]

    def integers(self, low: int, high: int) -> Tensor:
        assert (low, high) == (0, self.high)
        return self.index


def batch_of(method: LCD, draws: Draws, rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(4)
    mean, logvar = torch.randn(2, 6, 4, 8, 8, generator=generator)
    posterior = torch.cat([5 * mean, logvar - 1], dim=1)
    captions = CAPTIONS[rows]
    return Batch(
        draws, latents=posterior[rows], condition=method.teacher.condition(captions), captions=captions
    )


def loss_of(method: LCD, batch: Batch) -> Tensor:
    return method("student", batch, Progress(0, 10, {"student": 0}), {})["loss"]


def known_batch(method: LCD, index: list[int] | None = None) -> Batch:
    return batch_of(method, Known(range(6), index or INDEX, method.settings.num_ddim_timesteps))


# A second implementation, written from the formulae with its own networks


def alphas_cumprod() -> Tensor:
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


def x0_and_eps(kind: str, o: Tensor, z: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        return (z - (1 - abar).sqrt() * o) / abar.sqrt(), o
    if kind == "v_prediction":
        return abar.sqrt() * z - (1 - abar).sqrt() * o, abar.sqrt() * o + (1 - abar).sqrt() * z
    return o, (z - abar.sqrt() * o) / (1 - abar).sqrt()


def plain_loss(
    method: LCD, batch: Batch, teacher: nn.Module, student: nn.Module, target: nn.Module, kind: str
) -> Tensor:
    s, draws = method.settings, batch.draws
    assert isinstance(draws, Known) and batch.latents is not None and batch.condition is not None
    prompts = batch.condition.arguments["encoder_hidden_states"]
    empty = batch.condition.empty["encoder_hidden_states"].expand_as(prompts)
    posterior_noise, noise = draws.normals
    (w,), bounds = draws.uniforms, draws.bounds
    assert bounds == [(s.w_min, s.w_max)]
    skip = 1000 // s.num_ddim_timesteps
    t_hi = (draws.index + 1) * skip - 1
    t_lo = torch.tensor([max(int(t) - skip, 0) for t in t_hi])
    embedding = {} if method.student.lora else {"timestep_cond": guidance_embedding(w, s.guidance_dim)}
    table = alphas_cumprod()
    hi, lo, w = table[t_hi].view(-1, 1, 1, 1), table[t_lo].view(-1, 1, 1, 1), w.view(-1, 1, 1, 1)

    def f(network: nn.Module, z: Tensor, t: Tensor, abar: Tensor) -> Tensor:
        o = network(z, t, encoder_hidden_states=prompts, **embedding).sample
        scaled = (s.timestep_scaling * t).view(-1, 1, 1, 1)
        c_skip = 0.25 / (scaled**2 + 0.25)
        c_out = scaled / (scaled**2 + 0.25) ** 0.5
        return c_skip * z + c_out * x0_and_eps(kind, o, z, abar)[0]

    mean, logvar = batch.latents.chunk(2, dim=1)
    z0 = SCALING_FACTOR * (mean + (logvar / 2).exp() * posterior_noise)
    z_hi = hi.sqrt() * z0 + (1 - hi).sqrt() * noise
    prediction = f(student, z_hi, t_hi, hi)
    with torch.no_grad():
        x0_c, eps_c = x0_and_eps(kind, teacher(z_hi, t_hi, encoder_hidden_states=prompts).sample, z_hi, hi)
        x0_u, eps_u = x0_and_eps(kind, teacher(z_hi, t_hi, encoder_hidden_states=empty).sample, z_hi, hi)
        x0, eps = x0_c + w * (x0_c - x0_u), eps_c + w * (eps_c - eps_u)
        aim = f(target, lo.sqrt() * x0 + (1 - lo).sqrt() * eps, t_lo, lo)
    d = prediction - aim
    return ((d**2 + s.huber_c**2) ** 0.5 - s.huber_c).mean() if s.distance == "huber" else (d**2).mean()


def network_like(method: LCD, folder: Path, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """An own network with the student's structure and these weights, all others the teacher's."""
    base = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    if method.student.lora:
        s = method.parts.student
        targets = list(s.target_modules)
        base.add_adapter(LoraConfig(r=s.rank, lora_alpha=s.lora_alpha, target_modules=targets), "student")
    else:
        config = {**base.config, "time_cond_proj_dim": method.settings.guidance_dim}
        base = UNet2DConditionModel.from_config(config)
    own = dict(base.named_parameters())
    assert weights.keys() <= own.keys()
    for name, value in weights.items():
        own[name].data = value.detach().clone()
    return base


@pytest.mark.parametrize(
    ("prediction", "student", "settings"),
    [
        ("epsilon", None, {"num_ddim_timesteps": 25}),
        ("v_prediction", None, {"num_ddim_timesteps": 50, "huber_c": 0.3, "timestep_scaling": 0.02}),
        ("sample", None, {"num_ddim_timesteps": 25, "distance": "l2", "target_decay": 0.5}),
        ("epsilon", None, {"num_ddim_timesteps": 50, "target_decay": None}),
        ("epsilon", LORA, {"num_ddim_timesteps": 25}),
        ("v_prediction", LORA, {"num_ddim_timesteps": 50, "timestep_scaling": 0.02}),
    ],
)
def test_loss_and_gradients_are_those_of_a_plain_implementation(
    prediction: str,
    student: StudentSettings | None,
    settings: dict[str, Any],
    build_lcd: Build,
    tiny_pipeline: Path,
) -> None:
    method = build_lcd(prediction=prediction, student=student, **settings, shake=0.05)
    batch = known_batch(method)
    loss = loss_of(method, batch)
    loss.backward()

    weights: dict[str, Tensor] = {**method.student.trained()}
    teacher = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").requires_grad_(False)
    own = network_like(method, tiny_pipeline, weights)
    target = network_like(method, tiny_pipeline, method.target.tensors() if method.target else weights)
    expected = plain_loss(method, batch, teacher, own, target, prediction)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)
    reference = dict(own.named_parameters())
    largest = max(p.grad.norm() for p in reference.values() if p.grad is not None)
    for name, p in method.student.trained().items():
        assert p.grad is not None, name
        assert (p.grad - reference[name].grad).norm() < 1e-3 * p.grad.norm() + 1e-5 * largest, name


@pytest.mark.parametrize("student", [None, LORA])
def test_the_gradient_reaches_the_student_and_nothing_else(
    student: StudentSettings | None, build_lcd: Build
) -> None:
    method = build_lcd(student=student, shake=0.05)
    loss_of(method, known_batch(method)).backward()
    trained = {id(p) for p in method.student.trained().values()}
    assert all(p.grad is not None and p.grad.norm() > 0 for p in method.student.trained().values())
    others: list[Tensor] = [
        p for module in method.teacher.modules() for p in module.parameters() if id(p) not in trained
    ]
    others += [] if method.target is None else [*method.target.buffers()]
    assert others and all(p.grad is None and not p.requires_grad for p in others)
    assert {id(p) for p in method.parameters() if p.requires_grad} == trained
    assert [id(p) for p in method.players()["student"]] == [id(p) for p in method.student.trained().values()]


@pytest.mark.parametrize("student", [None, LORA])
def test_teacher_and_target_are_evaluated_without_a_graph(
    student: StudentSettings | None, build_lcd: Build
) -> None:
    """Three passes a step, of which one keeps a graph: the student's, of B rows, beside 2B of the teacher."""
    method = build_lcd(student=student)
    seen: list[tuple[int, bool]] = []

    def note(module: nn.Module, inputs: tuple, output: tuple) -> None:
        seen.append((len(output[0]), torch.is_grad_enabled()))

    for network in {method.student.network, method.teacher.denoiser.network}:
        network.register_forward_hook(note)
    loss_of(method, known_batch(method))
    assert sorted(seen) == [(6, False), (6, True), (12, False)]


def test_at_the_lowest_level_the_target_is_the_teachers_state_itself(build_lcd: Build) -> None:
    """t_lo = 0 there, where f is the identity: the target's weights cannot matter, and above they do."""
    method = build_lcd(shake=0.05)
    lowest, next_level = (loss_of(method, known_batch(method, [i] * 6)) for i in (0, 1))
    assert method.target is not None
    for average in method.target.tensors().values():
        average.mul_(1.5)
    assert torch.equal(loss_of(method, known_batch(method, [0] * 6)), lowest)
    assert (loss_of(method, known_batch(method, [1] * 6)) - next_level).abs() > 1e-2


def test_the_consistency_function_is_the_identity_at_time_zero(build_lcd: Build) -> None:
    method = build_lcd(prediction="v_prediction", shake=0.05)
    batch = known_batch(method)
    assert batch.condition is not None
    z = torch.randn(6, 4, 8, 8)
    condition = method.embedded(batch.condition, torch.full((6,), 7.5))
    assert torch.equal(method.function(z, torch.zeros(6), condition), z)


@pytest.mark.parametrize("student", [None, LORA])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(
    student: StudentSettings | None, build_lcd: Build
) -> None:
    method = build_lcd(student=student, shake=0.05)
    whole = loss_of(method, batch_of(method, Draws(1, 2, range(6))))
    parts = [
        loss_of(method, batch_of(method, Draws(1, 2, rows), slice(rows.start, rows.stop)))
        for rows in (range(3), range(3, 6))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=0)
    assert (parts[0] - parts[1]).abs() > 1e-3


@pytest.mark.parametrize("student", [None, LORA])
def test_the_loss_falls_in_training(student: StudentSettings | None, build_lcd: Build) -> None:
    method = build_lcd(student=student)
    before = {k: p.detach().clone() for k, p in method.student.trained().items()}
    optimiser = torch.optim.Adam(method.players()["student"], 3e-3)
    losses = []
    for step in range(25):
        loss = loss_of(method, batch_of(method, Draws(0, step % 3, range(6))))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after("student")
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(not torch.equal(p, before[k]) for k, p in method.student.trained().items())
