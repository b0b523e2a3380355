"""The EDM loss against the formula written out, and the sampler that goes with what it trains."""

from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.errors import UserError
from fewstep.distill.pretrain.edm import EDMTraining
from fewstep.distill.pretrain.settings import EDMSettings
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress

from ..rounding import rounding

NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "add_attention": False,
    "num_class_embeds": 3,
}
CLASSES = ("bag", "coat", "shirt")


def built(**settings: Any) -> EDMTraining:
    student = StudentSettings(init="scratch", network=NETWORK)
    return EDMTraining(EDMSettings(**settings), Parts(None, student, [], CLASSES, 8))


@pytest.mark.parametrize("settings", [{}, {"p_mean": -0.4, "p_std": 0.9, "sigma_data": 0.3}])
def test_the_loss_is_the_weighted_denoising_error(settings: dict[str, float]) -> None:
    method = built(**settings)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    batch = Batch(Draws(0, 3, range(6)), images=images, condition=Condition({"class_labels": labels}, {}))
    loss = method("student", batch, Progress(0, 1, {}), {})["loss"]
    loss.backward()

    mean, std, sd = (settings.get(k, v) for k, v in (("p_mean", -1.2), ("p_std", 1.2), ("sigma_data", 0.5)))
    draws = Draws(0, 3, range(6))
    s = (mean + std * draws.normal(())).exp().view(-1, 1, 1, 1)
    x0 = images.mean(1, keepdim=True)
    x = x0 + s * draws.normal((1, 8, 8))
    root = (s**2 + sd**2).sqrt()
    with torch.no_grad():
        output = method.student.network(x / root, 250 * s.log().flatten(), class_labels=labels).sample
    error = sd**2 / root**2 * x + s * sd / root * output - x0
    expected = (root**2 / (s * sd) ** 2 * error**2).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in method.players()["student"])


def test_pictures_are_those_of_the_exported_pipeline() -> None:
    method = built(num_inference_steps=6, sigma_min=0.01, sigma_max=20.0, sigma_data=0.4, rho=5.0).eval()
    export = method.export()
    c = export.model.scheduler.config
    assert (c.sigma_min, c.sigma_max, c.sigma_data, c.rho) == (0.01, 20.0, 0.4, 5.0)
    assert export.sampling == {"default": {"num_inference_steps": 6}}
    export.model.set_progress_bar_config(disable=True)
    rows = method.pictures(["shirt", "bag"], 5)
    assert list(rows) == ["4 steps", "6 steps"]
    for n, row in zip((4, 6), rows.values(), strict=True):
        images = export.model(2, [2, 0], n, generator=seeded(2, 5), output_type="pt").images
        allowed = 2 * rounding(export.model.unet, n)  # pictures from -1 to 1
        torch.testing.assert_close(row, (2 * images - 1).expand(-1, 3, -1, -1), rtol=0, atol=allowed)


def test_an_architecture_is_needed() -> None:
    with pytest.raises(UserError, match=r"student\.network: missing; give the arguments of a UNet2DModel"):
        EDMTraining(EDMSettings(), Parts(None, StudentSettings(), []))
