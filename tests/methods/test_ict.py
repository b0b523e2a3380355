"""Consistency training on pixels: pairs, boundary, dropout masks, targets, switches, refusals and a toy run."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion import draws
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.consistency_training import base as consistency_training
from fewstep.distill.methods.consistency_training.curriculum import lognormal_bins
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.consistency_training.settings import ICTSettings
from fewstep.distill.methods.published import PUBLISHED
from fewstep.distill.training.checkpoint import kept_state
from fewstep.distill.training.contract import Batch
from scipy.stats import chisquare
from torch import Tensor, nn

from .ict_parts import GREY, at, gradients, pixel_batch, pixel_ict, pixel_teacher, shaken, step

NONE = Condition({}, {})
DROPPED = {**GREY, "dropout": 0.5}
EMA = {"target": "ema", "target_decay": 0.6}


def fixed_pairs(method: ICT, low: float, high: float) -> None:
    chosen = (torch.full((4,), low, dtype=torch.float64), torch.full((4,), high, dtype=torch.float64))
    method.pairs = lambda batch, progress: chosen  # type: ignore[method-assign]


def test_defaults_are_those_of_ict() -> None:
    s = ICTSettings()
    assert (s.ode_source, s.target, s.curriculum, s.noise) == ("data", "student", "doubling", "lognormal")
    assert (s.distance, s.huber_c, s.weighting) == ("pseudo_huber", None, "inverse_gap")
    assert (s.s0, s.s1, s.p_mean, s.p_std) == (10, 1280, -1.1, 2.0)
    assert (s.sigma_min, s.sigma_max, s.sigma_data, s.rho) == (0.002, 80.0, 0.5, 7.0)
    assert (s.q, s.k, s.b, s.num_stages) == (2.0, 8.0, 1.0, 8)
    assert (s.solver, s.guidance_scale, s.num_points, s.target_decay) == ("heun", 1.0, 18, 0.9)
    assert [(p.benchmark.split(",")[0], p.steps, p.value) for p in PUBLISHED["ict"]] == [
        ("CIFAR-10", 1, 2.51), ("CIFAR-10", 2, 2.24), ("ImageNet 64 x 64", 1, 3.25), ("ImageNet 64 x 64", 2, 2.77),
    ]  # fmt: skip


def test_the_first_pair_aims_at_x_lo_itself_whatever_the_network_is() -> None:
    """f(x, sigma_min) = x: the aim is x0 + sigma_min z."""
    method = pixel_ict(network=DROPPED, huber_c=0, weighting="uniform")
    low, high = method.process.grid(11)[:2].tolist()
    fixed_pairs(method, low, high)
    batch = pixel_batch(method)
    assert batch.images is not None
    x0, z = batch.images.mean(1, keepdim=True), Draws(5, 0, range(4)).normal((1, 8, 8))
    torch.manual_seed(7)
    y = method.predict(x0 + high * z, torch.full((4,), high), NONE)
    expected = (y - (x0 + low * z)).flatten(1).norm(dim=1).mean()
    assert step(method, batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(method.predict(x, torch.full((4,), low, dtype=torch.float64), NONE), x)


def test_levels_are_drawn_with_their_probabilities() -> None:
    method = pixel_ict()
    low, high = method.pairs(Batch(Draws(0, 0, range(5000))), at(0))
    sigmas = method.process.grid(11)
    index = torch.searchsorted(sigmas, low)
    assert torch.equal(sigmas[index + 1], high)
    expected = lognormal_bins(sigmas, -1.1, 2.0) * 5000
    assert chisquare(torch.bincount(index, minlength=10).numpy(), expected.numpy()).pvalue > 0.01


def test_the_number_of_levels_follows_the_iteration_and_the_last_eighth_has_1281() -> None:
    method = pixel_ict()
    counts = [method.points_at(at(k, 80)) for k in (0, 9, 10, 69, 70, 79)]
    assert counts == [11, 11, 21, 641, 1281, 1281]
    assert [pixel_ict(curriculum="sqrt", s0=2, s1=150).points_at(at(k, 8)) for k in (0, 4)] == [2, 107]
    assert pixel_ict(curriculum="constant", num_points=40).points_at(at(79, 80)) == 40


@pytest.mark.parametrize("settings", [{}, {**EMA}], ids=["student", "average equal to the student"])
def test_both_passes_drop_the_same_units(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At equal levels the distance of a network with dropout 0.5 to itself is exactly 0, with other masks not."""
    method = pixel_ict(network=GREY, dropout=0.5, **settings)
    fixed_pairs(method, 0.8, 0.8)
    assert step(method, pixel_batch(method))["distance"].item() == 0.0
    monkeypatch.setattr(consistency_training, "same_random", lambda *_: nullcontext())
    assert step(method, pixel_batch(method))["distance"].item() > 1e-3


@pytest.mark.gpu
def test_both_passes_drop_the_same_units_on_a_gpu() -> None:
    method = pixel_ict(dropout=0.5).to("cuda")
    method.pairs = lambda batch, progress: (torch.full((4,), 0.8).cuda(),) * 2  # type: ignore[method-assign]
    batch = pixel_batch(method)
    assert batch.images is not None
    batch = Batch(Draws(5, 0, range(4), "cuda"), images=batch.images.cuda())
    assert step(method, batch)["distance"].item() == 0.0
    state = torch.cuda.get_rng_state()
    assert method("student", batch, at(0), {})["distance"].item() == 0.0
    assert not torch.equal(torch.cuda.get_rng_state(), state)


def test_the_next_pass_draws_new_masks() -> None:
    """After the target's pass, random numbers go on from where the student's left them."""
    method = pixel_ict(network=DROPPED)
    x, sigma = torch.randn(4, 1, 8, 8), torch.full((4,), 0.8)
    torch.manual_seed(7)
    method.predict(x, sigma, NONE)
    expected = torch.rand(3)
    step(method, pixel_batch(method))
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_repeat_within_the_context_and_resume_after_an_error() -> None:
    device = torch.device("cpu")
    state = draws.random_state(device)
    first, second = torch.rand(3), torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    with pytest.raises(KeyError), draws.same_random(state, device):
        assert torch.equal(torch.rand(3), first)
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.rand(3), second)


@pytest.mark.parametrize("settings", [{}, EMA], ids=["student", "ema"])
def test_the_gradient_is_that_of_a_constant_target(settings: dict[str, Any]) -> None:
    method = shaken(pixel_ict(network=DROPPED, **settings))
    batch = pixel_batch(method)
    step(method, batch)["loss"].backward()
    ours = {k: g.clone() for k, g in gradients(method).items()}
    method.zero_grad()

    assert batch.images is not None
    x0 = batch.images.mean(1, keepdim=True)
    low, high = method.pairs(pixel_batch(method), at(0))
    draws = Draws(5, 0, range(4))
    draws.uniform()
    z = draws.normal((1, 8, 8))
    weights = None if method.target is None else method.target.tensors()
    torch.manual_seed(7)
    constant = method.predict(x0 + low.float().view(-1, 1, 1, 1) * z, low, NONE, weights).detach()
    torch.manual_seed(7)
    y = method.predict(x0 + high.float().view(-1, 1, 1, 1) * z, high, NONE)
    (method.distance(y, constant) / (high - low)).mean().backward()
    for name, gradient in gradients(method).items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_one_pass_of_the_student_keeps_a_graph_and_the_others_do_not() -> None:
    method = pixel_ict(network=None, teacher=pixel_teacher(), ode_source="teacher", **EMA)
    teacher = method.parts.need_teacher().denoiser.network
    seen: list[tuple[str, bool, bool]] = []
    for name, network in (("student", method.student.network), ("teacher", teacher)):
        network.register_forward_hook(
            lambda module, inputs, output, name=name: seen.append(
                (name, torch.is_grad_enabled(), module.training)
            )
        )
    step(method, pixel_batch(method))["loss"].backward()
    assert seen == [
        ("student", True, True), ("teacher", False, False), ("teacher", False, False), ("student", False, True),
    ]  # fmt: skip
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    trained = {id(p) for p in method.student.trained().values()}
    assert {id(p) for p in method.parameters()} == trained
    assert {id(p) for p in method.players()["student"]} == trained


class Knows(Denoiser):
    """A teacher that gives the clean sample."""

    def __init__(self, method: ICT, x0: Tensor):
        super().__init__(nn.Identity(), method.process, "sample")
        self.x0 = x0

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return ((self.x0,),), {}


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_teacher_that_knows_the_data_gives_the_loss_from_data(solver: str) -> None:
    from_data = pixel_ict(network=DROPPED)
    from_teacher = pixel_ict(network=DROPPED, teacher=pixel_teacher(), ode_source="teacher", solver=solver)
    from_teacher.student.network.load_state_dict(from_data.student.network.state_dict())
    batch = pixel_batch(from_data)
    assert batch.images is not None
    teacher = from_teacher.parts.need_teacher()
    other = step(from_teacher, pixel_batch(from_data))["loss"].item()
    teacher.denoiser = Knows(from_teacher, batch.images.mean(1, keepdim=True))
    ours, theirs = step(from_data, batch)["loss"], step(from_teacher, pixel_batch(from_data))["loss"]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)
    assert abs(other - ours.item()) > 1e-2


def test_the_average_alone_sees_x_lo() -> None:
    """Its weights, not the student's: a target moved away changes the loss, as an equal one does not."""
    plain, averaged = (pixel_ict(network=GREY, **s) for s in ({}, EMA))
    averaged.student.network.load_state_dict(plain.student.network.state_dict())
    assert averaged.target is not None
    for name, average in averaged.target.tensors().items():
        average.copy_(plain.student.trained()[name])
    assert torch.equal(step(averaged, pixel_batch(plain))["loss"], step(plain, pixel_batch(plain))["loss"])
    for average in averaged.target.tensors().values():
        average.mul_(1.2)
    moved, own = step(averaged, pixel_batch(plain))["loss"], step(plain, pixel_batch(plain))["loss"]
    assert (moved - own).abs() > 1e-2


def test_the_target_decays_by_the_schedule_of_the_last_iteration() -> None:
    """mu = exp(2 ln 0.9 / (N - 1)) with N = 2, 107 under the square root, target_decay itself elsewhere."""
    for settings, iteration, decay in (
        ({"curriculum": "sqrt", "s0": 2, "s1": 150}, 0, 0.81),
        ({"curriculum": "sqrt", "s0": 2, "s1": 150}, 200, 0.9980140),
        ({"curriculum": "doubling"}, 200, 0.9),
        ({"curriculum": "constant"}, 200, 0.9),
        ({"curriculum": "continuous"}, 200, 0.9),
    ):
        method = pixel_ict(target="ema", target_decay=0.9, **settings)
        step(method, pixel_batch(method), at(iteration))
        assert method.target is not None
        start = {k: v.clone() for k, v in method.target.tensors().items()}
        with torch.no_grad():
            for p in method.student.trained().values():
                p.add_(1.0)
        method.after("student")
        moved = {k: v - start[k] for k, v in method.target.tensors().items()}
        assert set(moved) == set(method.student.trained())
        for difference in moved.values():
            torch.testing.assert_close(difference, torch.full_like(difference, 1 - decay), rtol=0, atol=5e-7)
    method = pixel_ict()
    method.after("student")
    assert method.target is None and len(kept_state(method)) == len(method.student.trained())
