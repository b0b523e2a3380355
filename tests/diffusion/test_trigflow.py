"""TrigFlow, and networks of every kind seen in it: recorded values, closed forms, precision at both ends."""

import math

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser, DenoiserView, Prediction, reach, seen_in
from fewstep.distill.diffusion.derivative import scaled_derivative
from fewstep.distill.diffusion.process import EDM, VP, RectifiedFlow, TrigFlow
from torch import Tensor, nn

NOTHING = Condition({}, {})
T = torch.tensor([0.08, 0.5, 0.9, 1.3, 1.5], dtype=torch.float64)


class Call(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (self.f(x, t.view(-1, *[1] * (x.ndim - 1))),)


class Direct(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


@pytest.fixture
def vp() -> VP:
    return VP(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double().square().neg().add(1).cumprod(0))


def seen(f, inner, kind: str, x: Tensor, t: Tensor, outer: TrigFlow | None = None) -> Prediction:
    return DenoiserView(Direct(Call(f), inner, kind), outer or TrigFlow())(x, t, NOTHING)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_process_is_a_rotation(sigma_data: float) -> None:
    process = TrigFlow(sigma_data)
    assert process.t_range == (0.0, math.pi / 2)
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    t = T[:, None]
    expected = t.cos() * x0 + t.sin() * sigma_data * eps
    torch.testing.assert_close(process.noised(x0, eps, T), expected)
    slope = torch.func.jvp(lambda s: process.noised(x0, eps, s), (T,), (torch.ones_like(T),))[1]
    by_hand = process.alpha_dot(T)[:, None] * x0 + process.sigma_dot(T)[:, None] * eps
    torch.testing.assert_close(by_hand, slope)
    torch.testing.assert_close(process.time_of(process.log_snr(T)), T, rtol=1e-14, atol=0)
    ends = torch.tensor([float("inf"), -float("inf")]).double()
    assert process.time_of(ends).tolist() == [0.0, math.pi / 2]
    assert process.share(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, math.pi / 4, math.pi / 2]


@pytest.mark.parametrize(
    ("t", "values", "slopes"),
    [
        (0.5, (0.73691528, -0.35329600, 353.296003), (-0.21621683, -0.54304413, 543.044125)),
        (1.5, (0.93612607, -0.93378106, 933.781061), (0.81214752, -0.87633202, 876.332018)),
    ],
)
def test_recorded_coefficients_of_a_straight_path_s_network(
    t: float, values: tuple[float, ...], slopes: tuple[float, ...]
) -> None:
    """c_skip = c_in, c_out, and 1000 times the network's time, with their derivatives in t."""

    def coefficients(t: Tensor) -> Tensor:
        told: list[Tensor] = []

        def network(x: Tensor, tau: Tensor) -> Tensor:
            told.extend((x, tau))
            return torch.ones_like(x)

        one = torch.ones(1, 1, dtype=torch.float64)
        x0_at_one = seen(network, RectifiedFlow(), "velocity", one, t).x0[0, 0]
        x0_at_zero = seen(lambda x, tau: torch.zeros_like(x), RectifiedFlow(), "velocity", one, t).x0[0, 0]
        assert torch.allclose(told[0][0, 0], x0_at_zero, atol=1e-12)
        return torch.stack([x0_at_zero, x0_at_one - x0_at_zero, 1000 * told[1][0, 0]])

    at = torch.tensor([t], dtype=torch.float64)
    found, rates = torch.func.jvp(coefficients, (at,), (torch.ones_like(at),))
    assert found.tolist() == pytest.approx(values, rel=2e-8)
    assert rates.tolist() == pytest.approx(slopes, rel=2e-8)


def test_recorded_views_of_an_affine_velocity() -> None:
    x, t = torch.tensor([[1.2, -0.4]], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    prediction = seen(lambda x, tau: 0.3 * x + 0.7 * tau - 0.2, RectifiedFlow(), "velocity", x, t)
    assert prediction.x0[0].tolist() == pytest.approx([0.6051687003, -0.3431831677], abs=1e-9)
    assert prediction.velocity[0].tolist() == pytest.approx([0.1796992544, 0.1206893051], abs=1e-9)


def test_closed_forms_of_every_kind(vp: VP) -> None:
    """((cos - sin) x + v) / (cos + sin); v itself; (eps - sin x) / cos; -F of EDM; at times that each network knows."""
    x, raw = torch.randn(2, 5, 3, dtype=torch.float64)
    c, s = T.cos()[:, None], T.sin()[:, None]
    expected = {
        ("velocity", RectifiedFlow()): ((c - s) * x + raw) / (c + s),
        ("v_prediction", vp): raw,
        ("epsilon", vp): (raw - s * x) / c,
        ("trigflow", TrigFlow()): raw,
    }
    for (kind, inner), f in expected.items():
        prediction = seen(lambda z, t: raw, inner, kind, x, T)
        torch.testing.assert_close(prediction.velocity, f, rtol=1e-10, atol=1e-10, msg=kind)
        torch.testing.assert_close(c * x - s * prediction.velocity, prediction.x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(s * x + c * prediction.velocity, prediction.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_a_network_of_edm_gives_minus_f_at_its_own_input_and_time(sigma_data: float) -> None:
    told: list[Tensor] = []
    raw = torch.randn(5, 3, dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.extend((x, t[:, 0]))
        return raw

    x = torch.randn(5, 3, dtype=torch.float64)
    prediction = seen(network, EDM(1e-3, 1e3, sigma_data), "edm", x, T, TrigFlow(sigma_data))
    torch.testing.assert_close(prediction.velocity, -sigma_data * raw)
    torch.testing.assert_close(told[0], x / sigma_data)
    torch.testing.assert_close(told[1], 250 * (sigma_data * T.tan()).log())


def test_views_are_those_of_known_data_and_noise(vp: VP) -> None:
    """Seen from the outside: x0 and eps that made the state, at times within the network's reach."""
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    for inner in (RectifiedFlow(), vp, EDM()):
        for outer in (TrigFlow(), TrigFlow(0.5), RectifiedFlow()):
            t = 0.9 * T / 1.5 if isinstance(outer, RectifiedFlow) else T
            x = outer.noised(x0, eps, t)

            def network(z: Tensor, s: Tensor, inner=inner) -> Tensor:
                return eps if not isinstance(inner, EDM) else edm_output(inner, z, s)

            def edm_output(inner: EDM, z: Tensor, s: Tensor) -> Tensor:
                sigma = (s / 250).exp()
                skip, out, scale = (k.view(-1, 1) for k in inner.scalings(sigma[:, 0]))
                return (x0 - skip * z / scale) / out

            kind = "edm" if isinstance(inner, EDM) else "epsilon"
            if isinstance(inner, RectifiedFlow):
                kind, network = "velocity", lambda z, s: eps - x0
            prediction = DenoiserView(Direct(Call(network), inner, kind), outer)(x, t, NOTHING)
            torch.testing.assert_close(prediction.x0, x0, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(prediction.eps, eps, rtol=1e-8, atol=1e-8)
            velocity = outer.alpha_dot(t)[:, None] * x0 + outer.sigma_dot(t)[:, None] * eps
            torch.testing.assert_close(prediction.velocity, velocity, rtol=1e-8, atol=1e-8)


def test_a_view_is_bounded_at_both_ends(vp: VP) -> None:
    """At t = 0 the velocity is eps and f = x; at pi/2 it is -x0, also where the network's own noise ends before."""
    x, raw = torch.randn(2, 2, 3).double()
    t = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    for kind, inner in (("velocity", RectifiedFlow()), ("v_prediction", vp), ("epsilon", vp)):
        prediction = seen(lambda z, t: raw, inner, kind, x, t)
        assert prediction.velocity.isfinite().all(), kind
        torch.testing.assert_close(prediction.velocity[1], -prediction.x0[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(prediction.velocity[0], prediction.eps[0], rtol=0, atol=1e-12)
    f = seen(lambda z, t: raw, RectifiedFlow(), "velocity", x, t)
    torch.testing.assert_close(f.x0[0], x[0])
    torch.testing.assert_close(f.velocity[0], x[0] + raw[0])
    near = torch.full((2,), 1e-7).double()  # where (cos x - x0) / sin has lost nine digits
    f = seen(lambda z, t: raw, RectifiedFlow(), "velocity", x, near)
    torch.testing.assert_close(f.velocity, x + raw, rtol=1e-6, atol=0)


def test_reach_and_identity(vp: VP) -> None:
    inner = Direct(Call(lambda x, t: x), vp, "epsilon")
    process = TrigFlow()
    assert reach(seen_in(inner, process)) == pytest.approx(
        (math.atan(0.029167), math.atan(14.6146)), abs=2e-6
    )
    assert reach(seen_in(Direct(Call(lambda x, t: x), RectifiedFlow(), "velocity"), process)) == (
        0.0,
        math.pi / 2,
    )
    own = Direct(Call(lambda x, t: x), process, "trigflow")
    assert seen_in(own, process) is own


@pytest.mark.parametrize("kind", ["velocity", "v_prediction", "epsilon", "edm"])
@pytest.mark.parametrize("by", ["kernel", "math", "double_backward", "finite_difference"])
def test_the_scaled_derivative_is_that_along_the_path(kind: str, by: str, vp: VP) -> None:
    """cos t sin t dF/dt, against central differences of the bare network in float64 along dx/dt."""
    inner = {"velocity": RectifiedFlow(), "edm": EDM(sigma_data=1.0)}.get(kind, vp)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(0.7 * x) + 0.3 * torch.cos(0.004 * t) * x

    view = DenoiserView(Direct(Call(network), inner, kind), TrigFlow())
    x, velocity = torch.randn(2, 4, 3).double()
    t = torch.tensor([0.2, 0.71, 1.1, 1.4], dtype=torch.float64)
    scale = t.cos() * t.sin()
    found = scaled_derivative(view, {}, x, t, velocity, scale, NOTHING, by=by, step=1e-4, within=(0.1, 1.45))
    h = 1e-5
    ahead, behind = (view(x + k * velocity, t + k, NOTHING).velocity for k in (h, -h))
    expected = scale[:, None] * (ahead - behind) / (2 * h)
    error = (found - expected).norm() / expected.norm()
    assert error < (3e-5 if by == "finite_difference" else 1e-6), error


def test_the_scale_enters_before_the_network() -> None:
    """EDM's time 250 ln(tan t) has a slope of 1 / (cos sin): finite where t is so small that the slope is not."""
    view = DenoiserView(Direct(Call(lambda x, t: t * x), EDM(1e-320, 80, 1.0), "edm"), TrigFlow())
    x, t = torch.ones(1, 1).double(), torch.tensor([1e-310], dtype=torch.float64)
    scale = t.cos() * t.sin()
    found = scaled_derivative(
        view, {}, x, t, torch.zeros_like(x), scale, NOTHING, by="math", step=1e-4, within=(0, 1.5)
    )
    assert found.item() == pytest.approx(-250, rel=1e-6)
