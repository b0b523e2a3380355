"""Losses of iCT, CT, CD and ECT against second implementations, one for each, and where their gradient goes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.training.contract import Batch, Progress
from torch import Tensor, nn

from .ict_parts import (
    CLASSES,
    GREY,
    Function,
    at,
    consistency,
    copied,
    edm_denoiser,
    gradients,
    heun,
    levels,
    pixel_batch,
    pixel_ict,
    pixel_teacher,
    shaken,
    step,
)

DROPPED = {**GREY, "dropout": 0.3}
CT = {
    "target": "ema", "curriculum": "sqrt", "s0": 2, "s1": 150, "noise": "uniform", "distance": "l2",
    "weighting": "uniform",
}  # fmt: skip
CD = {**CT, "ode_source": "teacher", "curriculum": "constant", "num_points": 18}
ECT = {"curriculum": "continuous", "huber_c": 0}


def column(a: Tensor) -> Tensor:
    return a.view(-1, 1, 1, 1)


def masked(network: Function, *args: Tensor) -> Tensor:
    """With the dropout masks of seed 7, that of `step`."""
    torch.manual_seed(7)
    return network(*args)


def norm(a: Tensor) -> Tensor:
    return a.square().sum((1, 2, 3)).sqrt()


def ict_loss(x0: Tensor, draws: Draws, num_points: int, own: Function, target: Function) -> Tensor:
    sigmas = levels(num_points).flip(0)
    edges = torch.erf((sigmas.log() + 1.1) / (2 * 2**0.5))
    p = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    index = (draws.uniform().double()[:, None] >= p.cumsum(0)).sum(1)
    low, high = column(sigmas[index]), column(sigmas[index + 1])
    z = draws.normal((1, 8, 8))
    y = masked(consistency(own), x0 + high.float() * z, high)
    with torch.no_grad():
        aim = masked(consistency(target), x0 + low.float() * z, low)
    c = 0.00054 * 64**0.5
    return (((norm(y - aim) ** 2 + c**2).sqrt() - c) / (high - low).float().flatten()).mean()


def ct_loss(x0: Tensor, draws: Draws, num_points: int, own: Function, target: Function) -> Tensor:
    """As public code draws its levels: from the largest, uniformly."""
    sigmas = levels(num_points)
    index = num_points - 2 - draws.integers(0, num_points - 1)
    high, low = column(sigmas[index]), column(sigmas[index + 1])
    z = draws.normal((1, 8, 8))
    x_hi = x0 + high.float() * z
    y = masked(consistency(own), x_hi, high)
    with torch.no_grad():
        x_lo = x_hi + (low - high).float() * (x_hi - x0) / high.float()  # Euler, the data for the denoiser
        aim = masked(consistency(target), x_lo, low)
    return (y - aim).square().mean((1, 2, 3)).mean()


def cd_loss(x0: Tensor, draws: Draws, own: Function, target: Function, teacher: Function) -> Tensor:
    sigmas = levels(18)
    index = 16 - draws.integers(0, 17)
    high, low = column(sigmas[index]), column(sigmas[index + 1])
    x_hi = x0 + high.float() * draws.normal((1, 8, 8))
    y = masked(consistency(own), x_hi, high)
    with torch.no_grad():
        aim = masked(consistency(target), heun(edm_denoiser(teacher), x_hi, high, low), low)
    return (y - aim).square().mean((1, 2, 3)).mean()


def ect_loss(x0: Tensor, draws: Draws, stage: int, own: Function, target: Function) -> Tensor:
    t = column((-1.1 + 2 * draws.normal(()).double()).exp())
    r = (t * (1 - (1 + 8 / (1 + t.exp())) / 2 ** (stage + 1))).clamp(min=0)
    assert (r > 0).sum() > 0 and (r == 0).any() == (stage < 2)
    z = draws.normal((1, 8, 8))
    y = masked(edm_denoiser(own), x0 + t.float() * z, t)
    with torch.no_grad():
        aim = masked(edm_denoiser(target), x0 + r.float() * z, r.where(r > 0, t))
    return (norm(y - aim.where(r > 0, x0)) / (t - r).float().flatten()).mean()


def told(network: nn.Module, batch: Batch) -> Function:
    labels = None if batch.condition is None else batch.condition.arguments["class_labels"]
    return lambda x, t: network(x, t, class_labels=labels).sample


def assert_same_loss_and_gradient(
    method: ICT, rows: range, progress: Progress, formula: Callable[..., Tensor], *args: Any
) -> None:
    batch = pixel_batch(method, rows)
    loss = step(method, batch, progress)["loss"]
    loss.backward()
    own = copied(method.student.network)
    target = own if method.target is None else copied(own, method.target.tensors())
    assert batch.images is not None
    x0 = batch.images.mean(1, keepdim=True)
    expected = formula(x0, Draws(5, 0, rows), *args, told(own, batch), told(target, batch))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    reference = {k: p.grad for k, p in own.named_parameters()}
    for name, gradient in gradients(method).items():
        assert gradient.norm() > 0, name
        assert (gradient - reference[name]).norm() < 2e-4 * gradient.norm(), name


@pytest.mark.parametrize("classes", [(), CLASSES], ids=["unconditional", "classes"])
@pytest.mark.parametrize(("iteration", "num_points"), [(0, 11), (49, 11), (50, 21), (399, 1281)])
def test_ict(iteration: int, num_points: int, classes: tuple[str, ...]) -> None:
    method = pixel_ict(network={**DROPPED, "num_class_embeds": len(classes) or None}, classes=classes)
    assert_same_loss_and_gradient(method, range(6), at(iteration), ict_loss, num_points)


@pytest.mark.parametrize(("iteration", "num_points"), [(1, 8), (200, 107), (399, 151)])
def test_ct(iteration: int, num_points: int) -> None:
    method = shaken(pixel_ict(network=DROPPED, **CT))
    assert_same_loss_and_gradient(method, range(6), at(iteration), ct_loss, num_points)


def test_cd() -> None:
    """The teacher's dropout is off, the student's and the target's is on."""
    teacher = pixel_teacher(DROPPED)
    method = shaken(pixel_ict(network=None, teacher=teacher, **CD))
    formula = partial(cd_loss, teacher=told(copied(teacher.pipeline.unet).eval(), pixel_batch(method)))
    assert_same_loss_and_gradient(method, range(6), at(0), formula)


@pytest.mark.parametrize("target", ["student", "ema"])
@pytest.mark.parametrize("start", ["teacher", "scratch"])
@pytest.mark.parametrize(("iteration", "stage"), [(0, 0), (50, 1), (399, 7)])
def test_ect(iteration: int, stage: int, start: str, target: str) -> None:
    """Where r is 0 the clean sample is the aim, and no network is asked about a level of 0."""
    teacher, network = (pixel_teacher(DROPPED), None) if start == "teacher" else (None, DROPPED)
    method = shaken(pixel_ict(network=network, teacher=teacher, target=target, **ECT))
    times: list[Tensor] = []
    method.student.network.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1]))
    assert_same_loss_and_gradient(method, range(8), at(iteration), ect_loss, stage)
    assert len(times) == 2 and torch.stack(times).isfinite().all()
