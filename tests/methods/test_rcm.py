"""rCM against recorded values: tangent, losses, turns, rollouts, switches, and what gets a gradient."""

import math
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Prediction
from fewstep.distill.diffusion.derivative import scaled_derivative
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.ema import EMA, power_decay
from fewstep.distill.diffusion.generator import Generator
from fewstep.distill.diffusion.process import VP, per_sample
from fewstep.distill.errors import UserError
from fewstep.distill.methods.score_distillation.rcm import RCM, LogWeight, tangent
from fewstep.distill.methods.score_distillation.settings import RCMSettings
from rcm_reference import (
    Affine,
    Direct,
    Script,
    batch_of,
    built,
    double,
    images,
    normal_of,
    progress,
    straight,
)
from torch import Tensor, nn

NOTHING = Condition({}, {})
X, T = images(1.2, -0.4), double(0.9)
TEACHER, STUDENT = (0.3, 0.7, -0.2), (0.5, -0.1, 0.05)
F_S, J = [0.1617509043, -0.0593789548], [-0.5636712165, 0.1763256663]
FORMS = {
    ("code", 1.0): [-0.01370214, 0.08802205],
    ("paper", 1.0): [-0.01370214, 0.08802205],
    ("scm", 1.0): [-0.01370214, 0.08802205],
    ("code", 0.5): [0.28178246, 0.02404889],
    ("code", 0.0): [0.57482809, -0.06439344],
    ("paper", 0.5): [-0.00005315, 0.11221173],
    ("paper", 0.0): [0.01115687, 0.11193223],
}


def taught(**settings: Any) -> RCM:
    """The recorded teacher and student, whose only batch is X at T: clean data 0, noise X / sin T."""
    method = built(RCM, straight(Affine(*TEACHER)), Affine(*STUDENT), **settings)
    method.student.denoiser.network.requires_grad_(True)
    return method


def at_x(*more: Tensor) -> Script:
    return Script(normal_of(0.9), X / math.sin(0.9), *more)


def quantities(method: RCM) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's F and J at (X, T)."""
    with torch.no_grad():
        f_t = method.source(X, T, NOTHING).velocity
        f_s = method.denoiser(X, T, NOTHING).velocity
    scale = T.cos() * T.sin()
    weights = {k: p.detach() for k, p in method.student.network.named_parameters()}
    j = scaled_derivative(
        method.denoiser, weights, X, T, f_t, scale, NOTHING, by="math", step=1e-3, within=method.within
    )
    return f_s, f_t, j


def test_recorded_student_and_derivative() -> None:
    f_s, f_t, j = quantities(taught())
    assert f_s.flatten().tolist() == pytest.approx(F_S, abs=1e-9)
    assert f_t.flatten().tolist() == pytest.approx([0.1796992544, 0.1206893051], abs=1e-9)
    assert j.flatten().tolist() == pytest.approx(J, abs=1e-9)


@pytest.mark.parametrize(("form", "r"), list(FORMS))
def test_recorded_tangents(form: Any, r: float) -> None:
    f_s, f_t, j = quantities(taught())
    g = tangent(form, r, X, T, f_s, f_t, j)
    assert g.flatten().tolist() == pytest.approx(FORMS[form, r], abs=1e-8)


def test_the_forms_of_the_warm_up_differ_where_the_sources_do() -> None:
    f_s, f_t, j = quantities(taught())
    c, s = T.cos().item(), T.sin().item()
    by_hand = -(c**2) * (f_s - f_t) - 0.5 * (c * s * X + j)
    torch.testing.assert_close(tangent("scm", 0.5, X, T, f_s, f_t, j), by_hand)


@pytest.mark.parametrize("derivative", ["kernel", "math", "double_backward", "finite_difference"])
def test_recorded_consistency_loss_and_its_gradient(derivative: str) -> None:
    method = taught(score_weight=0.0, derivative=derivative, derivative_step=1e-5)
    out = method("student", batch_of(at_x(), torch.zeros_like(X)), progress(), {})
    assert out["consistency"].item() == pytest.approx(0.22196286, abs=1e-7)
    assert out["loss"].item() == pytest.approx(22.196286, abs=1e-5)
    assert out["log_rate"].item() == pytest.approx(
        math.log(math.hypot(*FORMS["code", 1.0]) / math.cos(0.9)), abs=1e-6
    )
    x0_gap = torch.tensor(F_S) - torch.tensor([0.1796992544, 0.1206893051])
    assert out["teacher_gap"].item() == pytest.approx(
        (math.sin(0.9) * x0_gap).square().mean().item(), rel=1e-5
    )
    out["loss"].backward()
    found = method.student.network.abc.grad
    f = method.denoiser(X, T, NOTHING).velocity.flatten()
    aim = torch.tensor([-0.07246659, 0.46552278], dtype=torch.float64)
    (expected,) = torch.autograd.grad(-200 * (aim * f).sum(), method.student.network.abc)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert method.parts.teacher.denoiser.network.abc.grad is None


def test_normalisation_by_the_root_mean_square() -> None:
    """FastGen's: |g| / sqrt(D) + c in place of |g| + c."""
    out = taught(score_weight=0.0, per_element=True)(
        "student", batch_of(at_x(), torch.zeros_like(X)), progress(), {}
    )
    g = torch.tensor(FORMS["code", 1.0]).double()
    expected = (g / 2**0.5).square().sum() / ((g / 2**0.5).norm() + 0.1) ** 2
    assert out["consistency"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_samples_are_normalised_one_by_one() -> None:
    method = taught(score_weight=0.0)
    normals = Script(normal_of(0.9).repeat(2), torch.cat([X, 7 * X]) / math.sin(0.9))
    both = method("student", batch_of(normals, torch.zeros(2, 1, 1, 2).double()), progress(), {})
    alone = [
        method("student", batch_of(Script(normal_of(0.9), k * X / math.sin(0.9)), 0 * X), progress(), {})
        for k in (1, 7)
    ]
    assert both["consistency"].item() == pytest.approx(sum(a["consistency"].item() for a in alone) / 2)


def test_the_warm_up_grows_with_the_iteration() -> None:
    for iteration, r in ((0, 0.0), (500, 0.5), (1000, 1.0), (5000, 1.0)):
        method = taught(score_weight=0.0, tangent_warmup=1000)
        out = method("student", batch_of(at_x(), 0 * X), progress(iteration), {})
        g = torch.tensor(FORMS["code", r]).double()
        assert out["consistency"].item() == pytest.approx((g.norm() / (g.norm() + 0.1)).item() ** 2, rel=1e-6)


def test_from_data_the_velocity_is_the_noise_turned() -> None:
    """dx/dt = cos t eps - sin t x0, whatever the teacher says (sCT)."""
    method = taught(score_weight=0.0, source="data")
    seen: list[Tensor] = []
    velocity = method.velocity
    method.velocity = lambda t, views: seen.append(velocity(t, views)) or seen[-1]
    x0, eps = images(0.3, -1.0), images(1.5, 0.2)
    out = method("student", batch_of(Script(normal_of(0.9), eps), x0), progress(), {})
    torch.testing.assert_close(seen[0], math.cos(0.9) * eps - math.sin(0.9) * x0)
    assert "teacher_gap" not in out


def test_turns_and_steps_of_the_rollouts() -> None:
    method = taught(tangent_warmup=1000)
    asked: list[int] = []
    method.rollout = lambda draws, told, num_steps: (
        asked.append(num_steps) or torch.zeros(1, 1, 2, 2).double()
    )
    updates = {"student": 1000, "fake_score": 0}
    moves = []
    for iteration in range(1000, 1011):
        p = progress(iteration, **updates)
        (player,) = method.turns(p)
        moves.append(player)
        draws = Draws(0, iteration, range(1))
        method(player, batch_of(draws, torch.zeros(1, 1, 2, 2).double()), p, {})
        updates[player] += 1
    students = [i + 1000 for i, m in enumerate(moves) if m == "student"]
    assert students == [1000, 1005, 1010]
    assert asked == [1, 1, 2, 3, 4, 2, 1, 2, 3, 4, 3]
    assert all(method.turns(progress(i)) == ("student",) for i in (0, 1, 999))
    before = method(
        "student", batch_of(Draws(0, 0, range(1)), torch.zeros(1, 1, 2, 2).double()), progress(999), {}
    )
    assert "score" not in before and len(asked) == 11


def test_rollouts_start_at_the_end_and_their_times_do_not_rise() -> None:
    method = built(RCM, straight(Affine(*TEACHER)))
    times = torch.stack(method.rollout_times(Draws(0, 0, range(64)), 4))
    assert (times[0] == math.pi / 2).all() and (times.diff(dim=0) <= 0).all()
    assert len(set(times[1].tolist())) > 32  # a time for each sample
    own = method.score_times(Draws(0, 0, range(64)))
    assert torch.equal(times[1], own.clamp(max=math.pi / 2))
    fixed = built(RCM, straight(Affine(*TEACHER)), rollout_times=(1.5, 1.4, 1.0))
    expected = [math.pi / 2, 1.5, 1.4, 1.0]
    for n in (1, 2, 4):
        found = [t.tolist() for t in fixed.rollout_times(Draws(0, 0, range(2)), n)]
        assert found == [[t, t] for t in expected[:n]]


def walked(method: RCM, num_steps: int) -> tuple[Tensor, list[Tensor]]:
    """The rollout written out, all steps but the last without a gradient; and its noises."""
    draws = Draws(3, 0, range(2))
    noise = draws.normal((1, 2, 2)).double()
    times = [t.view(-1, 1, 1, 1) for t in method.rollout_times(draws, num_steps)]
    x, noises = noise, [noise]
    for i, t in enumerate(times):
        u = t.cos() + t.sin()
        v = method.student.network(x / u, (t.sin() / u).flatten())[0]
        x0 = x / u - t.sin() / u * v
        if i + 1 < num_steps:
            noises.append(draws.normal((1, 2, 2)).double())
            s = times[i + 1]
            x = s.cos() * x0.detach() + s.sin() * noises[-1]
    return x0, noises


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_rollout_has_the_gradient_of_its_last_step(num_steps: int) -> None:
    method = taught()
    sample = method.rollout(Draws(3, 0, range(2)), NOTHING, num_steps)
    expected, noises = walked(method, num_steps)
    torch.testing.assert_close(sample, expected, rtol=1e-12, atol=1e-12)
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), method.student.network.abc)[0] for y in (sample, expected)
    )
    torch.testing.assert_close(ours, theirs)
    graded = method.function  # with a gradient through every step it is another one
    every = torch.zeros(3).double()
    if num_steps > 1:
        draws = Draws(3, 0, range(2))
        noise = draws.normal((1, 2, 2)).double()
        times = method.rollout_times(draws, num_steps)
        whole = Generator(graded, times, "all")(noise, NOTHING, lambda x: draws.normal((1, 2, 2)).double())
        (every,) = torch.autograd.grad(whole.square().sum(), method.student.network.abc)
    assert not torch.allclose(ours, every, rtol=1e-2)


def gradients(method: RCM, player: str, **changes: Any) -> dict[str, float]:
    method.zero_grad(set_to_none=True)
    batch = batch_of(Draws(0, 0, range(4)), torch.randn(4, 1, 2, 2).double())
    method(player, batch, progress(student=1, fake_score=2, **changes), {})["loss"].backward()
    assert all(p.grad is None for p in method.parts.teacher.denoiser.parameters())
    return {
        name: sum(p.grad.abs().sum().item() for p in group if p.grad is not None)
        for name, group in method.players().items()
    }


@pytest.mark.parametrize("weights", [{}, {"scm_weight": 0.0}, {"score_weight": 0.0}])
def test_who_gets_a_gradient_and_what_the_switches_leave(weights: dict[str, float]) -> None:
    method = built(RCM, straight(Affine(*TEACHER)), **weights)
    with torch.no_grad():
        for p in method.student.trained().values():
            p.add_(0.1)
    moved = gradients(method, "student")
    assert moved.pop("student") > 0
    assert moved == ({} if weights == {"score_weight": 0.0} else {"fake_score": 0})
    out = method("student", batch_of(Draws(0, 0, range(4)), torch.randn(4, 1, 2, 2).double()), progress(), {})
    assert ("consistency" in out) == (weights != {"scm_weight": 0.0})
    assert ("score" in out) == (weights != {"score_weight": 0.0})
    if method.scored:
        assert gradients(method, "fake_score")["student"] == 0
        assert gradients(method, "fake_score")["fake_score"] > 0
    else:
        assert method.turns(progress(3)) == ("student",) and method.fake_score is None


def test_the_parts_of_the_loss_are_sums_over_elements_in_the_papers_balance() -> None:
    method = taught()
    out = method("student", batch_of(Draws(0, 0, range(4)), torch.randn(4, 1, 2, 2).double()), progress(), {})
    assert out["loss"].item() == pytest.approx(100 * out["consistency"].item() + out["score"].item())
    sample = torch.tensor([1.0, 2.0, -1.0, 0.5]).double().view(1, 1, 2, 2)
    fake = torch.tensor([0.9, 1.5, -1.2, 0.4], dtype=torch.float64).view(1, 1, 2, 2)
    real = torch.tensor([1.1, 1.8, -0.7, 0.6], dtype=torch.float64).view(1, 1, 2, 2)
    method = taught(scm_weight=0.0)
    method.rollout = lambda *_: sample.requires_grad_()
    method.scores = lambda *_: (fake, real)
    out = method("student", batch_of(Draws(0, 0, range(1)), sample.detach()), progress(), {})
    assert out["loss"].item() == pytest.approx(13.71428571, abs=1e-8)


def test_the_fake_score_learns_the_students_samples() -> None:
    """The recorded value: f = 0 network seen at t = 0.9 as in the paper's code, no guidance, no weighting."""
    method = taught(guidance_scale=1.0)
    g = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64).view(1, 1, 2, 2)
    f = torch.tensor([0.9, 1.5, -1.2, 0.4], dtype=torch.float64).view(1, 1, 2, 2)
    method.rollout = lambda *_: g

    class Answer(nn.Module):
        def forward(self, process: Any, x: Tensor, t: Tensor, told: Condition) -> Any:
            velocity = (per_sample(t.cos(), x) * x - f) / per_sample(t.sin(), x)
            return Prediction(velocity, x, t, process, "trigflow")

    method.fake_score = Answer()
    draws = Script(normal_of(0.9, mean=0.0), torch.randn(1, 1, 2, 2).double())
    out = method("fake_score", batch_of(draws, g), progress(fake_score=1), {})
    assert out["loss"].item() == pytest.approx(0.5052142615, abs=1e-9)


def noisy(**settings: Any) -> tuple[RCM, list[Tensor]]:
    """A method whose networks predict noise, and the times that it draws."""
    vp = VP(torch.linspace(0.9999, 0.004, 1000))
    method, times = built(RCM, Direct(Affine(*TEACHER), vp, "epsilon"), **settings), []
    noised = method.noised

    def kept(x0: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        times.append(t)
        return noised(x0, t, draws)

    method.noised = kept
    return method, times


@pytest.mark.parametrize(("player", "power", "seed"), [("student", 1, 2), ("fake_score", 2, 0)])
def test_rows_of_a_noise_prediction_are_weighted_by_what_its_output_moves(
    player: str, power: int, seed: int
) -> None:
    """One row: the weighted loss is cos t, or its square, times the plain one, at the t that was drawn."""
    key = "loss" if player == "fake_score" else "consistency"
    x0, values = torch.randn(1, 1, 2, 2).double(), []
    for weighted in (True, False):
        method, times = noisy(output_weight=weighted)
        out = method(player, batch_of(Draws(seed, 0, range(1)), x0), progress(), {})
        values.append(out[key].item())
    t = times[0].item()
    assert 0.05 < math.cos(t) < 0.98
    assert values[0] / values[1] == pytest.approx(math.cos(t) ** power, rel=1e-9)


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    method = taught(score_weight=0.0)
    x0 = torch.zeros(2, 1, 1, 2).double()
    eps = torch.cat([X, X]) / math.sin(0.9)
    guided = method.guided

    def broken(*arguments: Any) -> tuple[Tensor, ...]:
        views = [v.clone() for v in guided(*arguments)]
        views[0][1, 0, 0, 1] = math.nan
        return tuple(views)

    method.guided = broken
    out = method("student", batch_of(Script(normal_of(0.9).repeat(2), eps), x0), progress(), {})
    assert out["consistency"].item() == pytest.approx(0.22196286 / 2, abs=1e-7)
    assert out["skipped"].item() == 0.5 and out["log_rate"].isfinite()
    out["loss"].backward()
    assert method.student.network.abc.grad.isfinite().all()


def test_the_derivative_draws_the_masks_of_the_graded_pass() -> None:
    class Dropped(Affine):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
            mask = (torch.rand(x.shape) < 0.5).double()
            masks.append(mask)
            return (super().forward(x, t)[0] * mask,)

    masks: list[Tensor] = []
    method = taught(score_weight=0.0, derivative="math")
    method.student.denoiser.network = Dropped(*STUDENT)
    batch = batch_of(Draws(0, 0, range(4)), torch.randn(4, 1, 2, 2).double())
    for _ in range(2):
        method("student", batch, progress(), {})
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_the_learned_weight_is_algorithm_1s() -> None:
    """e^w / D square - w, whose w minimises it at ln(D / square)."""
    plain = taught(score_weight=0.0)
    method = taught(score_weight=0.0, adaptive=True, scm_weight=1.0)
    assert isinstance(method.log_weight, LogWeight) and set(method.players()) == {"student"}
    square = plain("student", batch_of(at_x(), 0 * X), progress(), {})["consistency"].item()
    found = method("student", batch_of(at_x(), 0 * X), progress(), {})["consistency"]
    assert found.item() == pytest.approx(square / 2, rel=1e-6)
    found.backward()
    assert method.log_weight.linear.bias.grad.item() == pytest.approx(square / 2 - 1, rel=1e-5)
    with torch.no_grad():
        method.log_weight.linear.bias.fill_(0.7)
    again = method("student", batch_of(at_x(), 0 * X), progress(), {})["consistency"].item()
    assert again == pytest.approx(math.exp(0.7) * square / 2 - 0.7, rel=1e-5)
    trained = {id(p) for p in method.players()["student"]}
    assert {id(p) for p in method.log_weight.parameters()} <= trained


def test_times_keep_to_the_teachers_reach_and_sampling_starts_at_sigma_max() -> None:
    method = taught(score_weight=0.0)
    method.within = (0.7, 0.8)
    seen: list[Tensor] = []
    noised = method.noised
    method.noised = lambda x0, t, draws: seen.append(t) or noised(x0, t, draws)
    method("student", batch_of(Draws(0, 0, range(64)), torch.randn(64, 1, 2, 2).double()), progress(), {})
    assert seen[0].min() == 0.7 and seen[0].max() == 0.8
    assert method.score_times(Draws(0, 0, range(64))).unique().numel() > 2
    assert method.score_times(Draws(0, 0, range(64))).max() == 0.8
    for sigma_max in (80.0, 10.0):
        times = taught(sigma_max=sigma_max).sampling.times
        assert times == pytest.approx([math.atan(sigma_max), 1.3, 1.0, 0.6])


def test_times_of_the_score_term() -> None:
    shifted = built(RCM, straight(Affine(*TEACHER)), score_law="shifted", score_shift=5.0)
    draws = Draws(0, 0, range(4))
    u = Draws(0, 0, range(4)).uniform().double()
    tau = 5 * u / (1 + 4 * u)
    torch.testing.assert_close(shifted.score_times(draws), torch.atan(tau / (1 - tau)))


def test_the_average_is_of_the_student_alone_with_the_recorded_decays() -> None:
    method = built(RCM, straight(Affine(*TEACHER)), adaptive=True)
    names = set(method.averaged())
    assert names and not any("fake_score" in k for k in names)
    assert sum(p.numel() for p in method.averaged().values()) == 3 + 65
    recorded = {1: 0.00408003, 10: 0.46930785, 100: 0.92406043, 1000: 0.99209815}
    for k, beta in recorded.items():
        assert power_decay(k, 0.1) == pytest.approx(beta, abs=1e-8)
    assert power_decay(1, 0.05) == pytest.approx(0.5**17.972, rel=1e-3)
    p = nn.Parameter(torch.zeros(1))
    ema = EMA({"p": p}, 0.5, warmup=True, std=0.1)
    with torch.no_grad():
        p.fill_(1.0)
    for k in (1, 2):
        before = ema.tensors()["p"].item()
        ema.update()
        beta = power_decay(k, 0.1)
        assert ema.tensors()["p"].item() == pytest.approx(beta * before + 1 - beta, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scm_weight": 0.0, "score_weight": 0.0}, "nothing is left to train on"),
        ({"source": "data", "guidance_scale": 2.0, "score_weight": 0.0}, "method.guidance_scale: 2.0 guides"),
        ({"scm_weight": 0.0, "tangent_warmup": 5}, "method.tangent_warmup, adaptive: no effect without"),
        ({"scm_weight": 0.0, "adaptive": True}, "method.tangent_warmup, adaptive: no effect without"),
        ({"rollout_times": (1.5,)}, "method.rollout_times: 1 for rollouts of up to 4 steps; give 3"),
        ({"times": (0.6, 1.0)}, "do not decrease"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(RCM, straight(Affine(*TEACHER)), **settings)


def test_defaults_are_the_papers() -> None:
    s = RCMSettings()
    assert (s.scm_weight, s.score_weight, s.tangent_c, s.max_rollout, s.student_update_freq) == (
        100,
        1,
        0.1,
        4,
        5,
    )
    assert (s.p_mean, s.p_std, s.score_p_mean, s.score_p_std, s.tangent_warmup) == (-0.8, 1.6, 0.0, 1.6, 0)
    assert (s.sigma_max, s.times) == (80.0, (1.3, 1.0, 0.6))
