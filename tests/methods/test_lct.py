"""Latent consistency training against a second implementation; its switches, coupling, masks, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.distill.catalog.methods import METHODS
from fewstep.distill.config.validation import validate
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.consistency_training.coupling import optimal_pairing
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.consistency_training.lct import LCT
from fewstep.distill.methods.consistency_training.settings import ICTSettings, LCTSettings
from fewstep.distill.methods.published import PUBLISHED
from fewstep.distill.methods.space import ClassLatentSpace
from fewstep.distill.training.checkpoint import kept_state
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .ict_parts import CAPTIONS, CLASSES, at, consistency, copied, gradients, levels, step
from .lct_parts import CLASSED, DIT, PLAIN, SCALES, Cached, lct, lct_batch, statistics

ROWS = range(8)
TOLD: dict[str, Any] = {"none": PLAIN, "classes": CLASSED, "texts": None}
PLAIN_LOSS = {"diffusion_weight": 0, "coupling": "none"}


def formula(
    method: LCT, own: nn.Module, rows: range, points: int, paired: bool = True, weight: float = 5.0
) -> Tensor:
    """The loss of `own`, a copy of the student, on `lct_batch`, from the paper's formulas, levels decreasing."""
    batch = lct_batch(method, rows)
    arguments = {} if batch.condition is None else batch.condition.arguments
    draws = Draws(5, 0, rows)
    mean, logvar = Cached()[rows].chunk(2, dim=1)
    mu, s = (torch.from_numpy(a).float() for a in statistics())
    x0 = 0.5 * (0.18215 * (mean + (logvar / 2).exp() * draws.normal((4, 8, 8))) - mu) / s

    sigmas = levels(points)
    edges = torch.erf((sigmas.flip(0).log() + 1.1) / (2 * 2**0.5))
    p = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    j = points - 2 - (draws.uniform().double()[:, None] >= p.cumsum(0)).sum(1)
    high, low = sigmas[j].view(-1, 1, 1, 1), sigmas[j + 1].view(-1, 1, 1, 1)

    n = draws.normal((4, 8, 8))
    if paired:
        told = arguments.get("class_labels", torch.zeros(len(rows))).tolist()
        if "encoder_hidden_states" in arguments:
            told = batch.captions
        cost = (x0.flatten(1)[:, None] - n.flatten(1)).square().sum(2).double().numpy()
        cost[np.array([[a != b for b in told] for a in told])] = 1e9
        n = n[torch.from_numpy(linear_sum_assignment(cost / cost.max())[1])]

    f = consistency(lambda x, t: own(x, t, **arguments).sample)
    torch.manual_seed(7)
    y = f(x0 + high.float() * n, high)
    torch.manual_seed(7)
    with torch.no_grad():
        aim = f(x0 + low.float() * n, low)
    m, m0 = ((y - a).square().mean((1, 2, 3)) for a in (aim, x0))
    c = SCALES[points]
    loss = ((m / (2 * c**2) + 1).log() / (high - low).float().flatten()).mean()
    early = j >= int(0.75 * points)
    if early.any():
        loss = loss + weight * ((1 / high.flatten() ** 2 + 4).float() * m0)[early].mean()
    return loss


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(("iteration", "points"), [(0, 11), (100, 21), (699, 641)])
def test_the_loss_is_the_papers(told: str, iteration: int, points: int, tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline, network=TOLD[told])
    rows = range(6) if told == "texts" else ROWS
    out = step(method, lct_batch(method, rows), at(iteration, 700))
    out["loss"].backward()
    own = copied(method.student.network)
    expected = formula(method, own, rows, points)
    expected.backward()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=2e-5)
    assert out["diffusion"] > 0
    reference = dict(own.named_parameters())
    for name, gradient in gradients(method).items():
        assert gradient.norm() > 0, name
        assert (gradient - reference[name].grad).norm() < 5e-4 * gradient.norm(), name


def test_defaults_are_the_papers() -> None:
    s = LCTSettings()
    assert METHODS["lct"].settings is LCT.Settings is LCTSettings and LCT.EXPORT_POINTS == 641
    assert (s.s0, s.s1, s.curriculum, s.noise, s.p_mean, s.p_std) == (
        10,
        640,
        "doubling",
        "lognormal",
        -1.1,
        2.0,
    )
    assert (s.sigma_min, s.sigma_max, s.sigma_data, s.rho, s.target) == (0.002, 80.0, 0.5, 7.0, "student")
    assert (s.distance, s.c, s.weighting, s.diffusion_weight, s.diffusion_from) == (
        "cauchy", None, "inverse_gap", 5.0, 0.75,
    )  # fmt: skip
    assert (s.coupling, s.normalise, s.two_step_sigma) == ("condition", True, 0.369)
    assert ICTSettings().s1 == 1280 and ICT.EXPORT_POINTS == 1281
    assert [(p.steps, p.value) for p in PUBLISHED["lct"]] == [
        (1, 7.27), (2, 6.93), (1, 8.87), (2, 7.71), (1, 8.72), (2, 8.29),
    ]  # fmt: skip


def test_without_its_pieces_it_is_ict_in_the_same_latents(tiny_pipeline: Path) -> None:
    """Same numbers, same dropout masks."""
    for distance in ("l2", "l1", "pseudo_huber"):
        ours = lct(
            tiny_pipeline, network=None, norm=None, dropout=0.3, distance=distance, normalise=False,
            sigma_data=1.0, s1=1280, two_step_sigma=0.821, **PLAIN_LOSS,
        )  # fmt: skip
        theirs = ICT(ICTSettings(distance=distance, sigma_data=1.0), ours.parts)  # type: ignore[arg-type]
        theirs.student.network.load_state_dict(ours.student.network.state_dict())
        theirs.train()
        batches = lct_batch(ours, range(6)), lct_batch(ours, range(6))
        a, b = step(ours, batches[0], at(250))["loss"], step(theirs, batches[1], at(250))["loss"]
        assert torch.equal(a, b) and a > 0


def test_distances_take_the_mean_over_a_sample(tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline)
    method.pairs(lct_batch(method), at(100, 700))
    assert method.scale() == pytest.approx(SCALES[21], rel=1e-6)
    a, b = torch.randn(2, 5, 4, 8, 8)
    m = (a - b).square().mean((1, 2, 3))
    c = SCALES[21]
    torch.testing.assert_close(method.distance(a, b), (m / (2 * c**2)).log1p(), rtol=1e-5, atol=0)
    for kind, expected in (("geman_mcclure", 2 * m / (m + 4e-4)), ("mean_huber", (m + 1e-4).sqrt() - 0.01)):
        other = lct(tiny_pipeline, distance=kind, c=0.01)
        torch.testing.assert_close(other.distance(a, b), expected, rtol=1e-5, atol=0)
    assert lct(tiny_pipeline, c=0.3).scale() == 0.3


def test_switches_take_their_pieces_away(tiny_pipeline: Path) -> None:
    """Each against the formula without it."""
    for settings, change in (
        ({"diffusion_weight": 0.0}, {"weight": 0.0}),
        ({"coupling": "none"}, {"paired": False}),
        (PLAIN_LOSS, {"weight": 0.0, "paired": False}),
    ):
        method = lct(tiny_pipeline, **settings)
        found = step(method, lct_batch(method, ROWS), at(0, 700))
        assert ("diffusion" in found) == ("diffusion_weight" not in settings)
        own = copied(method.student.network)
        expected = formula(method, own, ROWS, 11, **change)
        assert found["loss"].item() == pytest.approx(expected.item(), rel=2e-5)
        assert abs(found["loss"].item() / formula(method, own, ROWS, 11).item() - 1) > 1e-3


def test_noise_stays_with_the_rows_that_are_told_the_same(tiny_pipeline: Path) -> None:
    classed, free = lct(tiny_pipeline, network=CLASSED), lct(tiny_pipeline, network=CLASSED, coupling="batch")
    batch = lct_batch(classed, ROWS)
    x0 = classed.space.samples(batch)
    eps = Draws(9, 0, ROWS).normal((4, 8, 8))

    def noise(method: LCT) -> Tensor:
        batch.draws = Draws(9, 0, ROWS)
        return method.noise(x0, batch)

    within, everywhere = noise(classed), noise(free)
    for label in range(len(CLASSES)):
        rows = torch.arange(len(ROWS))[torch.arange(len(ROWS)) % len(CLASSES) == label]
        assert torch.equal(within[rows], eps[rows][optimal_pairing(x0[rows], eps[rows])])
    assert torch.equal(everywhere, eps[optimal_pairing(x0, eps)]) and not torch.equal(within, everywhere)
    assert torch.equal(noise(lct(tiny_pipeline, network=CLASSED, coupling="none")), eps)
    assert batch.condition is not None
    assert batch.condition.arguments["class_labels"].tolist() == [i % 3 for i in ROWS]


def test_rows_of_other_captions_exchange_nothing(tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline, network=None)
    batch = lct_batch(method, range(6))
    assert method.groups(batch) == CAPTIONS
    x0 = method.space.samples(batch)
    batch.draws = Draws(9, 0, range(6))
    assert torch.equal(method.noise(x0, batch), Draws(9, 0, range(6)).normal((4, 8, 8)))
    batch.captions = ["cat"] * 6
    batch.draws = Draws(9, 0, range(6))
    assert not torch.equal(method.noise(x0, batch), Draws(9, 0, range(6)).normal((4, 8, 8)))


def test_both_levels_have_the_same_paired_noise(tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline)
    seen: list[Tensor] = []
    method.student.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = lct_batch(method, ROWS)
    step(method, batch, at(0, 700))
    copy = lct_batch(method, ROWS)
    x0 = method.space.samples(copy)
    low, high = method.pairs(copy, at(0, 700))
    for x, sigma in zip(seen, (high, low), strict=True):
        column = sigma.float().view(-1, 1, 1, 1)
        eps = (x * (column**2 + 0.25).sqrt() - x0) / column
        drawn = Draws(5, 0, ROWS)
        drawn.normal((4, 8, 8)), drawn.uniform()
        expected = drawn.normal((4, 8, 8))
        wide = sigma > 0.05  # else the noise is lost in the rounding
        pairing = optimal_pairing(x0, expected)
        torch.testing.assert_close(eps[wide], expected[pairing][wide], rtol=1e-3, atol=1e-3)


def test_a_batch_in_parts_is_the_whole_one_without_coupling_alone(tiny_pipeline: Path) -> None:
    for coupling in ("none", "condition"):
        method = lct(tiny_pipeline, coupling=coupling, diffusion_weight=0)
        whole = step(method, lct_batch(method, ROWS))["loss"]
        parts = [step(method, lct_batch(method, rows))["loss"] for rows in (range(4), range(4, 8))]
        same = torch.allclose(whole, torch.stack(parts).mean(), rtol=1e-5)
        assert same == (coupling == "none")


def test_both_passes_drop_the_same_units(tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline, dropout=0.5)
    level = torch.full((8,), 0.8, dtype=torch.float64)
    method.num_points = 11
    method.pairs = lambda batch, progress: (level, level)  # type: ignore[method-assign]
    assert step(method, lct_batch(method, ROWS))["distance"].item() == 0.0


def test_no_early_sample_leaves_the_other_loss_alone(tiny_pipeline: Path) -> None:
    method, plain = lct(tiny_pipeline), lct(tiny_pipeline, diffusion_weight=0)
    plain.student.network.load_state_dict(method.student.network.state_dict())
    sigmas = method.process.grid(11)
    for m in (method, plain):
        m.num_points = 11
        m.pairs = lambda batch, progress: (sigmas[[5] * 8], sigmas[[6] * 8])  # type: ignore[method-assign]
        step(m, lct_batch(m, ROWS))["loss"].backward()
    assert step(method, lct_batch(method, ROWS))["diffusion"].item() == 0.0
    theirs = gradients(plain)
    for name, gradient in gradients(method).items():
        assert torch.equal(gradient, theirs[name]) and gradient.isfinite().all()


def test_statistics_are_measured_once_and_kept_by_checkpoints(tiny_pipeline: Path) -> None:
    fresh, method = lct(tiny_pipeline, measured=False), lct(tiny_pipeline)
    state = kept_state(method)
    assert {"statistics.mean", "statistics.std"} <= state.keys()
    assert not kept_state(fresh)["statistics.mean"].any()
    fresh.load_state_dict(state, strict=False)
    batches = lct_batch(method), lct_batch(fresh)
    assert torch.equal(method.space.samples(batches[0]), fresh.space.samples(batches[1]))
    plain = lct(tiny_pipeline, normalise=False, sigma_data=1.0)
    assert plain.statistics is None and isinstance(plain.space, ClassLatentSpace)
    trained = {id(p) for p in method.players()["student"]}
    assert {id(p) for p in method.parameters()} == trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": {"init": "teacher"}}, "student.init: teacher: this method trains new weights; set it to scratch"),
        ({"student": {"kind": "lora"}}, "student.kind: lora: this method trains all weights"),
        ({"distance": "l2", "c": 0.1}, "method.c: has no effect on distance l2; leave it out"),
        ({"network": {**PLAIN, "sample_size": 16}}, "student.network: in_channels 4, sample_size 16, but the latents"),
        ({"norm": "rms", "network": DIT}, "student.network: TwoTimeDiT refuses this .norm_type 'rms' is none"),
        ({"network": {"_class_name": "AutoencoderKL"}}, "student.norm: non_scaling: a AutoencoderKL has its own norms"),
        ({"network": {**PLAIN, "sample_size": None}}, "sample_size: a bias for each element needs a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    arguments: dict[str, Any], message: str, tiny_pipeline: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        lct(tiny_pipeline, **arguments)
    assert "\n" not in str(caught.value)


def test_pixels_are_refused(tiny_pipeline: Path) -> None:
    from dataclasses import replace

    parts = replace(lct(tiny_pipeline).parts, vae=None)
    with pytest.raises(UserError, match="vae: missing; this method works in the latents of `vae`"):
        LCT(LCTSettings(), parts)


@pytest.mark.parametrize(
    ("key", "value"),
    [("c", 0), ("diffusion_weight", -1), ("diffusion_from", 1.5), ("curriculum", "continuous"), ("coupling", "all")],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"method.{key}: '?{value}'? does not fit"):
        validate(LCTSettings, {key: value}, "method.")


def test_the_exported_levels_are_the_papers(tiny_pipeline: Path) -> None:
    method = lct(tiny_pipeline)
    assert method.calls() == {"1": {"timesteps": [0]}, "2": {"timesteps": [440, 0]}}
    assert method.times(2) == pytest.approx([80.0, 0.36932], abs=5e-6)
    church = lct(tiny_pipeline, two_step_sigma=0.5286)
    assert church.calls()["2"] == {"timesteps": [420, 0]}
    assert church.times(2)[1] == pytest.approx(0.52856, abs=5e-6)
