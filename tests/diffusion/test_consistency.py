"""The boundary condition of consistency functions in EDM's process: recorded scalings, diffusers, bit-exactness."""

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.consistency import ConsistencyFunction, edm_boundary, edm_scalings
from fewstep.distill.diffusion.denoiser import Denoiser
from fewstep.distill.diffusion.process import EDM
from torch import Tensor, nn

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 0.821, 1.526, 80.0], dtype=torch.float64)
RECORDED = {
    "c_skip": [1.0, 0.96300519, 0.50200400, 0.27151454, 0.09717886, 0.00003906],
    "c_out": [0.0, 0.09609691, 0.35213918, 0.42599871, 0.47452225, 0.49997773],
    "c_in": [1.99998400, 1.96116135, 1.41421356, 1.04028989, 0.62273261, 0.01249976],
    "time": [-1553.6520, -575.6463, -173.2868, -49.3080, 105.6625, 1095.5067],
}


def test_scalings_have_the_recorded_values_and_are_exact_at_sigma_min() -> None:
    c_skip, c_out = edm_scalings(SIGMAS, EDM())
    assert c_skip.tolist() == pytest.approx(RECORDED["c_skip"], abs=5.1e-9)
    assert c_out.tolist() == pytest.approx(RECORDED["c_out"], abs=5.1e-9)
    assert c_skip[0].item() == 1.0 and c_out[0].item() == 0.0


@pytest.mark.parametrize(("sigma_min", "sigma_data"), [(0.002, 0.5), (0.03, 1.3)])
def test_scalings_are_those_of_diffusers_consistency_scheduler(sigma_min: float, sigma_data: float) -> None:
    scheduler = CMStochasticIterativeScheduler(sigma_min=sigma_min, sigma_data=sigma_data)
    sigmas = torch.linspace(sigma_min, 80, 500, dtype=torch.float64)
    ours = edm_scalings(sigmas, EDM(sigma_min, 80.0, sigma_data))
    for a, b in zip(ours, scheduler.get_scalings_for_boundary_condition(sigmas), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [EDM(), EDM(0.03, 14.0, 1.3)], ids=["default", "latent"])
def test_the_boundary_of_a_denoiser_is_that_of_its_network(process: EDM) -> None:
    """f = a x + b D = c_skip x + c_out F for D = c_skip' x + c_out' F with EDM's own scalings, written out here."""
    sigma = process.grid(40)
    x, output = torch.randn(2, 40, dtype=torch.float64)
    sd, low = process.sigma_data, process.t_range[0]
    denoised = sd**2 / (sigma**2 + sd**2) * x + sigma * sd / (sigma**2 + sd**2) ** 0.5 * output
    expected = (
        sd**2 / ((sigma - low) ** 2 + sd**2) * x + sd * (sigma - low) / (sigma**2 + sd**2) ** 0.5 * output
    )
    a, b = edm_boundary(sigma, process)
    torch.testing.assert_close(a * x + b * denoised, expected, rtol=1e-12, atol=1e-12)
    assert a[0].item() == 1.0 and b[0].item() == 0.0


class Wild(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (1e4 * torch.randn_like(x) - x**3,)


class WildDenoiser(Denoiser):
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t), {}


@pytest.mark.parametrize("kind", ["edm", "sample", "epsilon"])
def test_any_network_is_the_identity_at_sigma_min_bit_for_bit(kind: str) -> None:
    process = EDM()
    function = ConsistencyFunction(WildDenoiser(Wild(), process, kind), lambda s: edm_boundary(s, process))
    x = torch.randn(4, 3, 8, 8)
    sigma = process.grid(11)[[0, 0, 0, 1]]
    f = function(x, sigma, Condition({}, {}))
    assert torch.equal(f[:3], x[:3])
    assert (f[3] - x[3]).abs().max() > 1


def test_an_edm_network_sees_the_recorded_states_and_times_and_others_their_own() -> None:
    x = torch.ones(6, 1, dtype=torch.float64)
    state, time = WildDenoiser(Wild(), EDM(), "edm").network_input(x, SIGMAS)
    assert state.flatten().tolist() == pytest.approx(RECORDED["c_in"], abs=5.1e-9)
    assert time.tolist() == pytest.approx(RECORDED["time"], abs=5.1e-5)
    scheduler = CMStochasticIterativeScheduler()
    assert time.tolist() == pytest.approx(scheduler.sigma_to_t(SIGMAS.numpy()).tolist(), rel=1e-12)
    untouched = WildDenoiser(Wild(), EDM(), "sample").network_input(x, SIGMAS)
    assert untouched[0] is x and untouched[1] is SIGMAS
