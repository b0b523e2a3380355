"""SCott's student: the steps of its teacher, its share of latent consistency distillation, samples and export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import Generator
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.scott import SCott
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Progress
from torch import Tensor

from .test_lcd import CAPTIONS, batch_of
from .test_lcd_gaussian import ExactTeacher, LinearStudent, Nothing, Slopes

Build = Callable[..., SCott]
LORA = StudentSettings(kind="lora", rank=4, lora_alpha=8)
AS_LCD: dict[str, Any] = {"segment": 20, "num_solver_steps": 1, "times": "grid", "solver": "ddim", "eta": 0.0,
                          "lambda_adv": 0.0}  # fmt: skip


def turn(
    method: Any, player: str = "student", seed: int = 1, carry: dict | None = None, iteration: int = 0
) -> dict[str, Tensor]:
    batch = batch_of(method, Draws(seed, 2, range(6)))
    return method(player, batch, Progress(iteration, 10, {}), {} if carry is None else carry)


@pytest.mark.parametrize("student", [None, LORA])
def test_without_noise_in_one_step_it_is_lcd_bit_for_bit(
    student: StudentSettings | None, build_scott: Build, build_lcd: Callable[..., LCD]
) -> None:
    ours, theirs = build_scott(student=student, shake=0.05, **AS_LCD), build_lcd(student=student, shake=0.05)
    assert list(ours.players()) == ["student"]
    losses = [turn(m)["loss"] for m in (ours, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, p in ours.student.trained().items():
        assert torch.equal(p.grad, theirs.student.trained()[name].grad), name
    with_noise = build_scott(student=student, shake=0.05, **{**AS_LCD, "eta": 0.3})
    assert (turn(with_noise)["loss"] - losses[0]).abs() > 1e-4


def plain_solution(method: SCott, z: Tensor, t: Tensor, condition: Condition, w: Tensor, seed: int) -> Tensor:
    """Three DDIM steps with eta = 0.5 by the scalar formulae, row by row, guided with each row's w."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).double()
    draws = Draws(seed, 2, range(6))
    prompts, empty = (c["encoder_hidden_states"] for c in (condition.arguments, condition.empty))
    lows = [[int(high - round(j * min(int(high), 24) / 3)) for high in t] for j in range(4)]
    unet = method.teacher.denoiser.network
    for j in range(3):
        xi = draws.normal(z.shape[1:])
        rows = []
        for i in range(6):
            high, low = lows[j][i], lows[j + 1][i]
            cond, uncond = (
                unet(z[i : i + 1], high, encoder_hidden_states=p).sample[0]
                for p in (prompts[i : i + 1], empty)
            )
            eps = (1 + w[i]) * cond - w[i] * uncond
            x0 = (z[i] - (1 - abar[high]).sqrt() * eps) / abar[high].sqrt()
            v = 0.25 * (1 - abar[low]) / (1 - abar[high]) * (1 - abar[high] / abar[low])
            rows.append(abar[low].sqrt() * x0 + (1 - abar[low] - v).sqrt() * eps + v.sqrt() * xi[i])
        z = torch.stack(rows).float()
    return z


def test_the_teachers_steps_are_guided_each_and_have_noise_of_their_own(build_scott: Build) -> None:
    method = build_scott(solver="ddim", eta=0.5)
    condition = method.teacher.condition(CAPTIONS)
    z = torch.randn(6, 4, 8, 8)
    t = torch.tensor([999.0, 519, 40, 24, 10, 1]).double()
    w = torch.linspace(5, 15, 6)
    with torch.no_grad():
        ours = method.teacher_step(z, t, (t - 24).clamp(min=0), condition, w, Draws(3, 2, range(6)))
        theirs = plain_solution(method, z, t, condition, w, 3)
    for i in range(6):
        assert ((ours[i] - theirs[i]).norm() / theirs[i].norm()).item() < 2e-5, i


def test_same_draws_same_target_and_the_noise_averages_out(build_scott: Build) -> None:
    """Over the noise alone, the mean solution of the exact Gaussian teacher is the one with none, scaled."""
    method = build_scott(solver="ddim", eta=1.0)
    method.teacher.denoiser = ExactTeacher(Nothing(), method.process, "epsilon")  # type: ignore[assignment]
    empty = {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    rows = 4000
    condition = Condition({"encoder_hidden_states": torch.zeros(rows, 1, 1)}, empty)
    z, t = torch.ones(rows, 1, 1, 1), torch.full((rows,), 519.0).double()

    def solution(seed: int) -> Tensor:
        return method.teacher_step(
            z, t, t - 24, condition, torch.full((rows,), 7.5), Draws(seed, 0, range(rows))
        )

    first, again, other = solution(1), solution(1), solution(2)
    assert torch.equal(first, again) and (first - other).abs().mean() > 0.1
    ratio = (method.process.alpha(t[:1]) / method.process.alpha(t[:1] - 24)).item()  # the slope for eta 1
    spread = first.std().item()
    assert first.mean().item() == pytest.approx(ratio, abs=4 * spread / rows**0.5)
    assert spread == pytest.approx((0.998418 - ratio**2) ** 0.5, rel=0.05)


def test_times_of_training_cover_all_or_a_grid_closed_under_the_segment(build_scott: Build) -> None:
    rows = Draws(0, 0, range(5000))
    every, grid = build_scott(lambda_adv=0.0), build_scott(lambda_adv=0.0, times="grid")
    high, low = every.training_times(rows)
    assert (high.min(), high.max()) == (1, 999) and len(high.unique()) > 980
    assert torch.equal(low, (high - 24).clamp(min=0))
    high, low = grid.training_times(rows)
    assert high.unique().tolist() == list(range(15, 1000, 24)) == grid.grid
    assert set(low.tolist()) - {0.0} <= set(high.tolist())
    assert [every.times(n) for n in (1, 2, 4)] == [[999], [999, 499], [999, 759, 499, 259]]
    assert grid.times(2) == [999, 495] and grid.calls(8.5)["2"]["timesteps"] == [999, 495]


@pytest.mark.parametrize(("num_steps", "times"), [(3, "all"), (5, "grid")])
def test_one_guided_evaluation_of_the_teacher_for_each_sub_step(
    num_steps: int, times: str, build_scott: Build
) -> None:
    """2B rows each, without a graph; beside them the student's pass, its target's, and the discriminator's."""
    method = build_scott(num_solver_steps=num_steps, times=times)
    seen: dict[str, list[tuple[int, bool]]] = {"teacher": [], "student": []}
    for name, network in (("teacher", method.teacher.denoiser.network), ("student", method.student.network)):
        network.register_forward_hook(
            lambda module, inputs, out, name=name: seen[name].append((len(out[0]), torch.is_grad_enabled()))
        )
    carry: dict[str, Any] = {}
    turn(method, carry=carry)
    assert seen == {"teacher": [(12, False)] * num_steps + [(6, True)], "student": [(6, True), (6, False)]}
    turn(method, "discriminator", carry=carry)
    assert seen["teacher"][num_steps + 1 :] == [(6, True)] * 2 and len(seen["student"]) == 2


@pytest.mark.parametrize("times", ["all", "grid"])
def test_the_exported_pipeline_gives_the_methods_samples(times: str, build_scott: Build) -> None:
    method = build_scott(times=times, shake=0.05)
    export = method.export()
    export.model.set_progress_bar_config(disable=True)
    for steps in (1, 4):
        generators = [[torch.Generator().manual_seed(s) for s in (3, 8)] for _ in range(2)]
        ours = method.sample(CAPTIONS[:2], steps, method.settings.w_export, generators[0])
        theirs = export.model(
            CAPTIONS[:2], generator=generators[1], output_type="latent", **export.sampling[str(steps)]
        ).images
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ddim"}, "method.eta: missing; solver ddim needs it"),
        ({"eta": 0.2}, "method.eta: 0.2 has no effect on solver er_sde"),
        ({"solver": "euler_ancestral", "noise_function": "SDE"}, "method.noise_function: SDE has no effect"),
        ({"segment": 1000}, "method.segment: 1000 is not below the teacher's 1000 steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(
    settings: dict[str, Any], message: str, build_scott: Build
) -> None:
    with pytest.raises(UserError, match=message):
        build_scott(**settings)


def test_two_solvers_are_ddim_with_eta_one(build_scott: Build) -> None:
    settings = [{"solver": "ddim", "eta": 1.0}, {"solver": "sde_dpm_solver++"}, {"solver": "euler_ancestral"}]
    losses = [turn(build_scott(lambda_adv=0.0, shake=0.05, **s))["loss"] for s in settings]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("slope", "times", "variance"),
    [
        ("one", [999, 759, 499, 259], 1.0),
        ("denoiser", [999], 0.00466),
        ("denoiser", [999, 499], 0.2011),
        ("denoiser", [999, 759, 499, 259], 0.3138),
    ],
)
def test_variance_of_the_samplers_pictures_of_gaussian_data(
    slope: str, times: list[int], variance: float, build_scott: Build
) -> None:
    """f = a(t) z: the exact a = 1 keeps variance 1; what eta = 1 alone would learn, a = alpha_t / alpha_0, does not."""
    process = build_scott(lambda_adv=0.0).process
    slopes = Slopes().double()
    t = torch.arange(1000).double()
    if slope == "denoiser":
        slopes.a.data = process.alpha(t) / process.alpha(t[:1])
    student: Denoiser = LinearStudent(slopes, process, "sample")
    units = iter(torch.eye(len(times), dtype=torch.float64)[:, None])
    noise = next(units)
    end = Generator(ConsistencyFunction(student), times)(noise, Condition({}, {}), lambda x: next(units))
    assert end.square().sum().item() == pytest.approx(variance, abs=6e-5)


class OneStream(Draws):
    """Draws from one generator: only their distribution matters here."""

    def __init__(self, rows: int):
        super().__init__(0, 0, range(0))
        self.rows = rows

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(self.rows, *shape)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.rows)

    def integers(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (self.rows,))


def regressed(z: Tensor, target: Tensor, distance: str) -> Tensor:
    """The slope of least squares, or of least absolute deviations: the median of target / z weighted with |z|."""
    if distance == "l2":
        return (z * target).sum() / z.square().sum()
    ratio, order = (target / z).sort()
    mass = z.abs()[order].cumsum(0)
    return ratio[torch.searchsorted(mass, mass[-1:] / 2)][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "slopes"),
    [
        ({"solver": "ddim", "eta": 0.2}, (0.9861, 0.9654, 0.9350, 0.8922)),
        ({"solver": "er_sde"}, (0.9852, 0.9499, 0.8664, 0.6603)),
    ],
)
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_a_linear_student_of_gaussian_data_lands_on_the_predicted_slopes(
    settings: dict[str, Any], slopes: tuple[float, ...], distance: str, build_scott: Build
) -> None:
    """Each level regressed on the targets of fresh noise; the slope of LCD, 0.99 at 999, would show noise unused."""
    method = build_scott(lambda_adv=0.0, distance=distance, target_decay=None, times="grid", **settings)
    student = Slopes()
    method.teacher.denoiser = ExactTeacher(Nothing(), method.process, "epsilon")  # type: ignore[assignment]
    method.function = ConsistencyFunction(LinearStudent(student, method.process, "sample"))
    rows, grid = 3000, method.grid
    posterior = torch.zeros(rows, 8, 8, 8)
    posterior[:, 4:] = -2 * torch.tensor(0.18215).log()
    states = {"encoder_hidden_states": torch.zeros(rows, 1, 1)}
    condition = Condition(states, {k: v[:1] for k, v in states.items()})
    for _ in range(43):  # the boundary a(0) = 1 moves up one level a sweep
        step = method.step(Batch(OneStream(rows), latents=posterior, condition=condition))
        z = method.process.noised(step.z0, step.eps, step.t_hi).flatten(1)
        for t in grid:
            mine = step.t_hi == t
            student.a.data[t] = regressed(z[mine].flatten(), step.target[mine].flatten(), distance)
    learned = student.a.detach()[[519, 759, 999]]
    assert learned.tolist() == pytest.approx(slopes[1:], abs=0.02)
