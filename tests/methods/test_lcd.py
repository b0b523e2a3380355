"""The latent consistency distillation loss against a plain second implementation, and its closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from fewstep.distill.checkpoint import kept_state
from fewstep.distill.condition import Condition
from fewstep.distill.config import StudentSettings
from fewstep.distill.consistency import ConsistencyFunction
from fewstep.distill.denoiser import Denoiser
from fewstep.distill.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.guidance import guidance_embedding
from fewstep.distill.methods.base import Batch, Parts, Progress
from fewstep.distill.methods.lcd import LCD, LCDSettings
from fewstep.distill.teacher import Teacher
from peft import LoraConfig
from torch import Tensor, nn

SCALING_FACTOR = 0.18215
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8.0)
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


def built(
    folder: Path, *, prediction: str = "epsilon", student: StudentSettings | None = None, **settings: Any
) -> LCD:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    settings = {"guidance_dim": 16, **settings}
    parts = Parts(Teacher(pipeline, str(folder)), student or StudentSettings(), CAPTIONS)
    return LCD(LCDSettings(**settings), parts)


def shaken(method: LCD, size: float = 0.05) -> LCD:
    """Student and target away from the teacher and from each other."""
    generator = torch.Generator().manual_seed(3)
    averages = [] if method.target is None else list(method.target.tensors().values())
    with torch.no_grad():
        for p in [*method.student.trained().values(), *averages]:
            p += size * torch.randn(p.shape, generator=generator)
    return method


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
    prediction: str, student: StudentSettings | None, settings: dict[str, Any], tiny_pipeline: Path
) -> None:
    method = shaken(built(tiny_pipeline, prediction=prediction, student=student, **settings))
    batch = known_batch(method)
    loss = loss_of(method, batch)
    loss.backward()

    weights: dict[str, Tensor] = {**method.student.trained()}
    teacher = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").requires_grad_(False)
    own = network_like(method, tiny_pipeline, weights)
    target = network_like(method, tiny_pipeline, method.target.tensors() if method.target else weights)
    expected = plain_loss(method, batch, teacher, own, target, prediction)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    reference = dict(own.named_parameters())
    largest = max(p.grad.norm() for p in reference.values() if p.grad is not None)
    for name, p in method.student.trained().items():
        assert p.grad is not None, name
        assert (p.grad - reference[name].grad).norm() < 1e-4 * p.grad.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("student", [None, LORA])
def test_the_gradient_reaches_the_student_and_nothing_else(
    student: StudentSettings | None, tiny_pipeline: Path
) -> None:
    method = shaken(built(tiny_pipeline, student=student))
    loss_of(method, known_batch(method)).backward()
    trained = {id(p) for p in method.student.trained().values()}
    assert all(p.grad is not None and p.grad.norm() > 0 for p in method.student.trained().values())
    others = [p for module in method.teacher.modules() for p in module.parameters() if id(p) not in trained]
    others += list(method.target.buffers()) if method.target else []
    assert others and all(p.grad is None and not p.requires_grad for p in others)
    assert {id(p) for p in method.parameters() if p.requires_grad} == trained
    assert [id(p) for p in method.players()["student"]] == [id(p) for p in method.student.trained().values()]


@pytest.mark.parametrize("student", [None, LORA])
def test_teacher_and_target_are_evaluated_without_a_graph(
    student: StudentSettings | None, tiny_pipeline: Path
) -> None:
    """Three passes a step, of which one keeps a graph: the student's, of B rows, beside 2B of the teacher."""
    method = built(tiny_pipeline, student=student)
    seen: list[tuple[int, bool]] = []

    def note(module: nn.Module, inputs: tuple, output: tuple) -> None:
        seen.append((len(output[0]), torch.is_grad_enabled()))

    for network in {method.student.network, method.teacher.denoiser.network}:
        network.register_forward_hook(note)
    loss_of(method, known_batch(method))
    assert sorted(seen) == [(6, False), (6, True), (12, False)]


def test_at_the_lowest_level_the_target_is_the_teachers_state_itself(tiny_pipeline: Path) -> None:
    """t_lo = 0 there, where f is the identity: the target's weights cannot matter, and above they do."""
    method = shaken(built(tiny_pipeline))
    lowest, next_level = (loss_of(method, known_batch(method, [i] * 6)) for i in (0, 1))
    assert method.target is not None
    for average in method.target.tensors().values():
        average.mul_(1.5)
    assert torch.equal(loss_of(method, known_batch(method, [0] * 6)), lowest)
    assert (loss_of(method, known_batch(method, [1] * 6)) - next_level).abs() > 1e-2


def test_the_consistency_function_is_the_identity_at_time_zero(tiny_pipeline: Path) -> None:
    method = shaken(built(tiny_pipeline, prediction="v_prediction"))
    batch = known_batch(method)
    assert batch.condition is not None
    z = torch.randn(6, 4, 8, 8)
    condition = method.embedded(batch.condition, torch.full((6,), 7.5))
    assert torch.equal(method.function(z, torch.zeros(6), condition), z)


@pytest.mark.parametrize("student", [None, LORA])
def test_the_student_is_the_teacher_at_step_0_for_every_omega(
    student: StudentSettings | None, tiny_pipeline: Path
) -> None:
    method = built(tiny_pipeline, student=student)
    condition = method.teacher.condition(CAPTIONS)
    z, t = torch.randn(6, 4, 8, 8), torch.linspace(0, 999, 6)
    with torch.no_grad():
        answers = [
            method.student.denoiser(z, t, method.embedded(condition, torch.full((6,), w)))
            for w in (5.0, 15.0)
        ]
        teacher = method.teacher.denoiser(z, t, condition)
    assert torch.equal(answers[0].output, teacher.output)
    assert torch.equal(answers[1].output, teacher.output)


# Unit Gaussian latents: the exact teacher is known, and so is the student that the loss leads to


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class ExactTeacher(Denoiser):
    """eps = sigma(t) x: data N(0, 1), whatever the prompt."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (self.process.sigma(t).to(x_t.dtype).view(-1, 1, 1, 1) * x_t,), {}


class Slopes(nn.Module):
    """x0 = a(t) x with one parameter for each of the 1000 times."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1000))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.a[t.long()].view(-1, 1, 1, 1) * x,)


class LinearStudent(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


def gaussian(folder: Path) -> tuple[LCD, Slopes, Batch]:
    """LCD between the two, on latents whose posterior is N(0, 1/scaling_factor^2): z0 is unit Gaussian."""
    method = built(folder, distance="l2", target_decay=None)
    slopes = Slopes()
    method.teacher.denoiser = ExactTeacher(Nothing(), method.process, "epsilon")  # type: ignore[assignment]
    method.function = ConsistencyFunction(LinearStudent(slopes, method.process, "sample"))
    rows = 400
    posterior = torch.zeros(rows, 8, 1, 1)
    posterior[:, 4:] = -2 * torch.tensor(SCALING_FACTOR).log()
    empty = Condition(
        {"encoder_hidden_states": torch.zeros(rows, 1, 1)}, {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    )
    return method, slopes, Batch(Draws(0, 0, range(rows)), latents=posterior, condition=empty)


def cosines(method: LCD) -> Tensor:
    """prod cos(theta_i - theta_{i-1}) over the levels 0, 19, 39, ..., 999; theta = arctan(sigma/alpha)."""
    abar = alphas_cumprod().double()[[0, *range(19, 1000, 20)]]
    theta = torch.atan2((1 - abar).sqrt(), abar.sqrt())
    return (theta[1:] - theta[:-1]).cos().cumprod(0)


def fresh(batch: Batch) -> Batch:
    return Batch(Draws(0, 0, range(400)), latents=batch.latents, condition=batch.condition)


def test_a_linear_student_of_gaussian_data_learns_the_products_of_cosines(tiny_pipeline: Path) -> None:
    """The loss is quadratic in each slope, so one Newton step per level and sweep solves it; 50 sweeps carry the
    boundary a(0) = 1 through the 50 levels."""
    method, slopes, batch = gaussian(tiny_pipeline)
    grid = torch.arange(19, 1000, 20)
    for _ in range(50):
        loss = loss_of(method, fresh(batch))
        (slope,) = torch.autograd.grad(loss, slopes.a, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), slopes.a)
        assert (curvature[grid] > 0).all()
        with torch.no_grad():
            slopes.a[grid] -= slope[grid] / curvature[grid]
    learned = slopes.a.detach()[[259, 519, 759, 999]]
    torch.testing.assert_close(learned, torch.tensor([0.9843, 0.9776, 0.9740, 0.9729]), rtol=0, atol=6e-5)
    torch.testing.assert_close(slopes.a.detach()[grid].double(), cosines(method), rtol=0, atol=2e-5)


def test_loss_and_gradient_vanish_at_the_closed_form_and_not_beside_it(tiny_pipeline: Path) -> None:
    method, slopes, batch = gaussian(tiny_pipeline)
    slopes.a.data[19::20] = cosines(method).float()
    loss = loss_of(method, fresh(batch))
    (slope,) = torch.autograd.grad(loss, slopes.a)
    assert loss.item() < 1e-10 and slope.abs().max() < 1e-6
    slopes.a.data[19::20] = 1.0
    loss = loss_of(method, fresh(batch))
    assert loss.item() > 1e-7
    (slope,) = torch.autograd.grad(loss, slopes.a)
    assert slope[19::20].min() > 0


def test_the_target_follows_the_student_after_its_turn(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline, target_decay=0.9)
    assert method.target is not None
    start = {k: v.clone() for k, v in method.target.tensors().items()}
    assert set(start) == set(method.student.trained())
    with torch.no_grad():
        for p in method.student.trained().values():
            p += 1.0
    method.after("student")
    for name, average in method.target.tensors().items():
        torch.testing.assert_close(average, start[name] + 0.1, rtol=0, atol=1e-6)


def test_a_lora_has_one_base_network_and_its_teacher_step_ignores_the_adapter(tiny_pipeline: Path) -> None:
    plain = built(tiny_pipeline)
    method = built(tiny_pipeline, student=LORA, target_decay=0.9)
    assert method.target is None
    assert method.student.network is method.teacher.denoiser.network is method.teacher.pipeline.unet
    shaken(method, 0.2)
    z, w = torch.randn(6, 4, 8, 8), torch.full((6,), 7.5)
    t_hi, t_lo = torch.full((6,), 519.0), torch.full((6,), 499.0)
    condition = method.teacher.condition(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(
            method.teacher_step(z, t_hi, t_lo, condition, w), plain.teacher_step(z, t_hi, t_lo, condition, w)
        )
        moved, still = (m.function(z, t_hi, condition) for m in (method, shaken(plain, 0.0)))
    assert (moved - still).abs().max() > 1e-2


def test_a_checkpoint_holds_the_trained_weights_and_the_target_only(tiny_pipeline: Path) -> None:
    full, lora = built(tiny_pipeline), built(tiny_pipeline, student=LORA)
    trained = len(full.student.trained())
    assert len(kept_state(full)) == 2 * trained + 1  # and the count of updates
    assert len(kept_state(lora)) == len(lora.student.trained())
    assert all("lora" in k for k in kept_state(lora))


@pytest.mark.parametrize("student", [None, LORA])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(
    student: StudentSettings | None, tiny_pipeline: Path
) -> None:
    method = shaken(built(tiny_pipeline, student=student))
    whole = loss_of(method, batch_of(method, Draws(1, 2, range(6))))
    parts = [
        loss_of(method, batch_of(method, Draws(1, 2, rows), slice(rows.start, rows.stop)))
        for rows in (range(3), range(3, 6))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-5, atol=0)
    assert (parts[0] - parts[1]).abs() > 1e-3


@pytest.mark.parametrize("student", [None, LORA])
def test_the_loss_falls_in_training(student: StudentSettings | None, tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline, student=student)
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


def sampled(method: LCD, num_steps: int, w: float, seeds: list[int]) -> Tensor:
    captions = [CAPTIONS[s % len(CAPTIONS)] for s in seeds]
    return method.sample(captions, num_steps, w, [torch.Generator().manual_seed(s) for s in seeds])


def test_samples_depend_on_omega_and_on_their_own_seed_only(tiny_pipeline: Path) -> None:
    method = shaken(built(tiny_pipeline))
    whole = sampled(method, 2, 7.5, [3, 8, 1])
    assert ((sampled(method, 2, 7.5, [8]) - whole[1]).norm() / whole[1].norm()).item() < 1e-5
    assert (sampled(method, 2, 12.0, [3, 8, 1]) - whole).norm() > 1e-2 * whole.norm()
    assert not whole.requires_grad


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("student", [None, LORA])
def test_the_exported_pipeline_gives_the_methods_samples(
    student: StudentSettings | None, prediction: str, tiny_pipeline: Path
) -> None:
    """By the call arguments that go with it: guidance_scale = omega + 1, or 1 for a LoRA."""
    method = shaken(built(tiny_pipeline, prediction=prediction, student=student))
    export = method.export()
    assert list(export.sampling) == ["1", "2", "3", "4", "6", "8"]
    assert (export.lora is not None) == method.student.lora
    export.model.set_progress_bar_config(disable=True)
    for steps in ("1", "4"):
        ours = sampled(method, int(steps), method.settings.w_export, [3, 8])
        generators = [torch.Generator().manual_seed(s) for s in (3, 8)]
        prompts = [CAPTIONS[3], CAPTIONS[2]]
        theirs = export.model(
            prompts, generator=generators, output_type="latent", **export.sampling[steps]
        ).images
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_min": 9.0, "w_max": 8.0}, "method.w_min: 9.0 is above method.w_max 8.0"),
        ({"w_export": 4.9}, "method.w_export: 4.9 is outside the trained range 5.0..15.0"),
        (
            {"num_ddim_timesteps": 60},
            "method.num_ddim_timesteps: 60 does not divide the teacher's 1000 steps",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(
    settings: dict[str, Any], message: str, tiny_pipeline: Path
) -> None:
    with pytest.raises(UserError, match=message):
        built(tiny_pipeline, **settings)


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="teacher: missing"):
        LCD(LCDSettings(), Parts(None, StudentSettings(), []))
