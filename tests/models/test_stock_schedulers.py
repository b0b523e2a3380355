"""Stock schedulers in the noise process that was trained, whatever class of scheduler the teacher has."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LCMScheduler
from fewstep.distill.diffusion.process import VP
from fewstep.distill.models.stock_schedulers import exchanged, lcm_scheduler

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OWN: dict[str, dict[str, Any]] = {
    "DDIM": {"thresholding": True, "clip_sample": True},
    "DDPM": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    "PNDM": {},
    "EulerDiscrete": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "HeunDiscrete": {},
    "DPMSolverMultistep": {**SD, "thresholding": True},
    "TCD": {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
}


def opened(name: str, folder: Path) -> Any:
    """As from a teacher's folder: its configuration knows which keys are its class's defaults."""
    cls = getattr(diffusers, f"{name}Scheduler")
    cls(**OWN[name]).save_pretrained(folder)
    return cls.from_pretrained(folder)


@pytest.mark.parametrize("name", OWN)
def test_one_step_of_lcms_scheduler_is_x0_of_the_process(name: str, tmp_path: Path) -> None:
    """x0 = (x - sigma eps) / alpha or alpha x - sigma v by the teacher's own betas, of values far beyond 1."""
    theirs = opened(name, tmp_path / "teacher")
    process, kind = VP.from_scheduler(theirs.config), theirs.config.prediction_type
    lcm_scheduler(process, kind, timestep_scaling=1e6).save_pretrained(tmp_path / "student")
    ours = LCMScheduler.from_pretrained(tmp_path / "student")
    abar = theirs.alphas_cumprod.double().clamp(min=2.0**-24)
    torch.testing.assert_close(ours.alphas_cumprod.double(), abar, rtol=2e-5, atol=0)
    last = len(abar) - 1
    ours.set_timesteps(timesteps=[last])
    x, output = 9 * torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    found = ours.step(output, last, x).denoised
    a, s = abar[-1].sqrt().float(), (1 - abar[-1]).sqrt().float()
    wanted = a * x - s * output if kind == "v_prediction" else (x - s * output) / a
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_another_class_keeps_the_process(tmp_path: Path) -> None:
    """DDIM's betas are not those that TCDScheduler has by default."""
    theirs = opened("PNDM", tmp_path)
    ours = exchanged(theirs, diffusers.TCDScheduler, timestep_spacing="trailing")
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert (ours.config.beta_schedule, ours.config.timestep_spacing) == ("linear", "trailing")
    flow = exchanged(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.FlowMatchHeunDiscreteScheduler
    )
    assert flow.config.shift == 3.0
