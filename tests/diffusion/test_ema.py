"""Averages of parameters against their closed form, with and without warm-up, and across a checkpoint."""

import pytest
import torch
from fewstep.distill.diffusion.ema import EMA
from torch import nn


def parameters() -> dict[str, nn.Parameter]:
    return {"block.0.weight": nn.Parameter(torch.randn(3, 2)), "bias": nn.Parameter(torch.randn(4))}


def test_a_step_of_the_parameters_decays_geometrically() -> None:
    """average_n = p + decay^n (start - p) when the parameters jump to p once."""
    named = parameters()
    start = {k: p.detach().clone() for k, p in named.items()}
    ema = EMA(named, 0.9)
    with torch.no_grad():
        for p in named.values():
            p.add_(2.0)
    for n in range(1, 6):
        ema.update()
        for name, average in ema.tensors().items():
            expected = named[name].detach() + 0.9**n * (start[name] - named[name].detach())
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
    assert int(ema.updates) == 5


def test_moving_parameters_against_the_written_out_sum() -> None:
    named = {"w": nn.Parameter(torch.zeros(()))}
    ema = EMA(named, 0.75)
    for value in (1.0, -2.0, 5.0):
        named["w"].data.fill_(value)
        ema.update()
    expected = 0.25 * (0.75**2 * 1.0 + 0.75 * -2.0 + 5.0)
    assert ema.tensors()["w"].item() == pytest.approx(expected, abs=1e-7)


def test_constant_weights_stay_constant() -> None:
    named = parameters()
    ema = EMA(named, 0.95, warmup=True)
    for _ in range(20):
        ema.update()
    for name, average in ema.tensors().items():
        assert torch.equal(average, named[name].detach())


def test_warmup_starts_with_the_short_memory_and_ends_with_the_decay() -> None:
    """Decays (1+n)/(10+n) = 0.1, 2/11, 3/12, then 0.3 from n = 3 on, where 4/13 is larger."""
    named = {"w": nn.Parameter(torch.zeros(()))}
    ema = EMA(named, 0.3, warmup=True)
    expected = 0.0
    for n, decay in enumerate([0.1, 2 / 11, 3 / 12, 0.3, 0.3]):
        named["w"].data.fill_(float(n + 1))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update()
        assert ema.tensors()["w"].item() == pytest.approx(expected, abs=1e-6)


def test_parameters_are_read_and_never_written() -> None:
    named = parameters()
    before = {k: p.detach().clone() for k, p in named.items()}
    ema = EMA(named, 0.5)
    for average in ema.tensors().values():
        average.add_(1.0)
    ema.update()
    for name, p in named.items():
        assert torch.equal(p, before[name]) and p.requires_grad
        assert not ema.tensors()[name].requires_grad
    assert not list(ema.parameters())


def test_only_the_given_parameters_are_averaged_under_their_own_names() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    chosen = {k: p for k, p in network.named_parameters() if k.startswith("1.")}
    ema = EMA(chosen, 0.9)
    assert set(ema.tensors()) == {"1.weight", "1.bias"}
    assert len(ema.state_dict()) == 3


def test_averages_and_warmup_count_go_through_the_state_dict() -> None:
    """Saved after two updates and restored into a new object, the average goes on as if never stopped."""
    named = parameters()
    ema = EMA(named, 0.99, warmup=True)

    def move(average: EMA, steps: range) -> None:
        for n in steps:
            for p in named.values():
                p.data.copy_(torch.full_like(p, float(n)))
            average.update()

    move(ema, range(2))
    resumed = EMA(named, 0.99, warmup=True)
    resumed.load_state_dict(ema.state_dict())
    move(ema, range(2, 5))
    move(resumed, range(2, 5))
    for name, average in ema.tensors().items():
        assert torch.equal(average, resumed.tensors()[name])
