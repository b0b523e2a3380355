"""Q-Sched's schedulers against values of the official code, closed forms and their stock classes."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from fewstep.pipelines import scheduler_q_sched as module
from torch import Tensor

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
C_EPS, C_X = [0.955, 1.003, 1.051, 1.099], [1.012, 0.997, 0.982, 0.967]

# Final samples of enyac-group/q-sched's modified schedulers (LCM: of the rule, which has no official code): inputs in
# `sample`. Beside them the stock class's.
OFFICIAL = {
    "tcd": (
        TCDScheduler,
        SD,
        {"eta": 0.0},
        [-18.672522, -18.725494, -11.237226, -3.757946, 9.182542, 16.576029, 16.444111, 8.986959],
        [-19.239828, -19.213301, -11.476754, -3.811749, 9.356739, 17.124834, 17.159180, 9.423267],
    ),
    "tcd, eta 0.3": (
        TCDScheduler,
        SD,
        {"eta": 0.3},
        [-16.855801, -21.316168, -8.946757, -0.990486, 16.200417, 16.366650, 18.784725, 18.831717],
        [-18.998171, -23.546774, -10.275954, -1.233938, 16.983694, 17.149912, 19.523794, 19.636543],
    ),
    "euler ancestral": (
        EulerAncestralDiscreteScheduler,
        {**SD, "steps_offset": 1},
        {},
        [-20.517368, -18.302816, -7.594342, -0.783436, 16.024965, 14.526815, 18.560102, 18.490318],
        [-21.599606, -18.821909, -6.048073, -1.188254, 22.034454, 16.976158, 19.545681, 19.355146],
    ),
    "flow match": (
        FlowMatchEulerDiscreteScheduler,
        FLOW,
        {},
        [-1.052526, -1.057654, -0.511501, -0.184699, 0.215350, 0.856778, 0.933116, 0.936287],
        [-1.118486, -1.102932, -0.536380, -0.190580, 0.243470, 0.893211, 0.969466, 0.972227],
    ),
    "lcm": (
        LCMScheduler,
        SD,
        {},
        [-19.665714, -21.249981, -8.321043, 1.534313, 20.185677, 13.713706, 18.717592, 18.748764],
        [-21.895149, -19.548841, -7.079368, 1.477932, 25.734713, 16.801788, 19.616240, 20.544157],
    ),
}
BASES = pytest.mark.parametrize("base", module.BASES, ids=lambda b: b.__name__)


def sine(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x + 0.01 * t)


def sample(scheduler, network=sine, *, x=None, num_steps=4, dtype=torch.float32, **extra) -> Tensor:
    scheduler.set_timesteps(num_steps)
    if x is None:
        x = torch.linspace(-1, 1, 8).reshape(1, 1, 2, 4) * getattr(scheduler, "init_noise_sigma", 1.0)
    x, generator = x.to(dtype), torch.Generator().manual_seed(7)
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra = {"generator": generator, **extra}
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(model_input, t).to(dtype), t, x, **extra, return_dict=False)[0]
    return x


def build(base: type, **coefficients):
    names = inspect.signature(base.__init__).parameters
    config = FLOW if base is FlowMatchEulerDiscreteScheduler else {k: v for k, v in SD.items() if k in names}
    cls = module.BASES[base] if coefficients else base
    return cls(**config, **coefficients)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_samples(name: str) -> None:
    base, config, extra, tuned, stock = OFFICIAL[name]
    ours = sample(module.BASES[base](**config, c_eps=C_EPS, c_x=C_X), **extra).flatten()
    plain = sample(base(**config), **extra).flatten()
    for got, expected in (
        (ours, tuned),
        (plain, stock),
    ):  # float32 near 20, which another torch rounds otherwise
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-5)


def test_official_grids() -> None:
    tcd, flow = (build(base, c_x=[1.0]) for base in (TCDScheduler, FlowMatchEulerDiscreteScheduler))
    euler = module.BASES[EulerAncestralDiscreteScheduler](**SD, steps_offset=1)
    for s in (tcd, euler, flow):
        s.set_timesteps(4)
    assert tcd.timesteps.tolist() == [999, 759, 499, 259]
    assert euler.timesteps.tolist() == [999, 749, 499, 249]
    expected = torch.tensor([14.614647, 4.081731, 1.612887, 0.693205, 0.0])
    torch.testing.assert_close(euler.sigmas.float(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.sigmas, torch.tensor([1, 0.667, 0.334, 0.001, 0]), rtol=0, atol=1e-6)


@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_identity_is_the_stock_class(base: type, dtype: torch.dtype) -> None:
    stock = sample(build(base), dtype=dtype)
    assert stock.dtype == dtype or base.__name__ == "LCMScheduler"
    for c in ({"c_x": None}, {"c_x": [1.0]}, {"c_x": [1.0] * 4, "c_eps": [1.0] * 4}):
        ours = sample(build(base, **c), dtype=dtype)
        assert ours.dtype == stock.dtype and torch.equal(ours, stock)


@BASES
def test_bfloat16_states_are_scaled_in_the_precision_of_the_base(base: type) -> None:
    """Euler and flow matching take the state to float32, there it is scaled; the others scale in bfloat16."""
    x, output = torch.randn(1, 1, 4, 8).bfloat16(), torch.randn(1, 1, 4, 8).bfloat16()
    tuned, stock = build(base, c_eps=[0.9], c_x=[1.1]), build(base)
    out = []
    for scheduler, state, e in (
        (tuned, x, output),
        (stock, 1.1 * (x.float() if tuned.upcast else x), 0.9 * output),
    ):
        scheduler.set_timesteps(4)
        torch.manual_seed(0)
        out.append(scheduler.step(e, scheduler.timesteps[0], state, return_dict=False)[0])
    assert tuned.upcast == ("Euler" in base.__name__)
    assert torch.equal(out[0], out[1])


@BASES
def test_saved_and_opened_again(base: type, tmp_path: Path) -> None:
    tuned = build(base, c_eps=C_EPS, c_x=C_X)
    expected = sample(tuned)
    assert not torch.equal(expected, sample(build(base)))
    tuned.save_pretrained(tmp_path)
    again = module.BASES[base].from_pretrained(tmp_path)
    assert again.config["c_eps"] == C_EPS and again.config["c_x"] == C_X
    assert all(again.config[k] == v for k, v in build(base).config.items() if k[0] != "_")
    assert torch.equal(sample(again), expected)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["c_x"] == C_X


@BASES
def test_made_from_the_stock_configuration_and_back(base: type) -> None:
    stock = build(base)
    ours = module.BASES[base].from_config(stock.config, c_eps=C_EPS)
    assert torch.equal(sample(ours), sample(build(base, c_eps=C_EPS)))
    assert inspect.signature(ours.set_timesteps) == inspect.signature(stock.set_timesteps)
    assert inspect.signature(ours.step) == inspect.signature(stock.step)


@BASES
def test_a_wrong_number_of_coefficients_is_refused(base: type) -> None:
    scheduler = build(base, c_eps=C_EPS, c_x=[1.0])
    with pytest.raises(ValueError, match="c_eps has 4 coefficients, but there are 3 steps"):
        scheduler.set_timesteps(3)
    scheduler.set_timesteps(4)


@BASES
def test_one_step(base: type) -> None:
    one = sample(build(base, c_eps=[0.9], c_x=[1.1]), num_steps=1)
    assert one.isfinite().all() and not torch.equal(one, sample(build(base), num_steps=1))


@BASES
def test_one_number_stands_for_all_steps(base: type) -> None:
    one, four = build(base, c_eps=[0.9], c_x=[1.1]), build(base, c_eps=[0.9] * 4, c_x=[1.1] * 4)
    assert torch.equal(sample(one), sample(four))


def test_linear_network_under_flow_matching() -> None:
    """x_N = x prod(c_x + (sigma' - sigma) c_eps a)."""
    x = torch.ones(1, dtype=torch.float64)
    out = sample(build(FlowMatchEulerDiscreteScheduler, c_eps=C_EPS, c_x=C_X), lambda x, t: 0.5 * x, x=x)
    assert float(out) == pytest.approx(0.552181, abs=1e-6)


def test_linear_network_under_tcd() -> None:
    x = torch.ones(1)
    scheduler = build(TCDScheduler, c_eps=C_EPS, c_x=C_X)
    out = sample(scheduler, lambda x, t: 0.5 * x, x=x, eta=0.0)
    assert float(out) == pytest.approx(3.316675, abs=2e-6)
    abar = scheduler.alphas_cumprod[[999, 759, 499, 259, 0]]
    expected = torch.tensor([0.004660, 0.052213, 0.277669, 0.658975, 0.999150])
    torch.testing.assert_close(abar, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("gain", "apart"), [(0.9, 0.1), (1.1, 0.1)])
def test_a_wrong_gain_is_undone_and_a_bias_is_not(gain: float, apart: float) -> None:
    """e_Q = g e: c_eps = 1 / g gives the full-precision samples."""
    right = sample(build(TCDScheduler), eta=0.0)
    off = sample(build(TCDScheduler), lambda x, t: gain * sine(x, t), eta=0.0)
    undone = sample(build(TCDScheduler, c_eps=[1 / gain]), lambda x, t: gain * sine(x, t), eta=0.0)
    assert (off - right).abs().max() > apart
    torch.testing.assert_close(undone, right, rtol=0, atol=2e-5)
    biased = [
        sample(build(TCDScheduler, c_eps=[c], c_x=[d]), lambda x, t: sine(x, t) + 0.3, eta=0.0)
        for c in (0.8, 0.9, 1.0, 1.1, 1.2)
        for d in (0.8, 0.9, 1.0, 1.1, 1.2)
    ]
    assert min(float((b - right).abs().max()) for b in biased) > apart


def test_ddim_finds_its_step_by_the_time() -> None:
    scheduler = build(DDIMScheduler, c_eps=C_EPS, c_x=C_X)
    scheduler.set_timesteps(4)
    assert [scheduler.position(t) for t in scheduler.timesteps] == [0, 1, 2, 3]
    assert scheduler.position(int(scheduler.timesteps[2])) == 2
