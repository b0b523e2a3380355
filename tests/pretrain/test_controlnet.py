"""ControlNet training: the loss against the formula written out with diffusers' own calls, and the export."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import SuperResolution
from fewstep.distill.models.frozen import weights_hash
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.pretrain.controlnet import ControlNetTraining
from fewstep.distill.pretrain.settings import ControlNetSettings
from fewstep.distill.reports.conditions import control_in
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor

ROWS = range(6)
CAPTIONS = ["cat", "dog", "red"] * 2


def built(folder: Path, moved: bool = True, dropout: float = 0.5) -> ControlNetTraining:
    """Whose adapter is no longer zero, if `moved`."""
    settings = ControlNetSettings(control=SuperResolution(factor=4), caption_dropout=dropout)
    method = ControlNetTraining(
        settings, Parts(Teacher.load(TeacherSettings(str(folder))), StudentSettings(), [])
    )
    if moved:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in method.controlnet.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return method


def batch(method: ControlNetTraining) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 16, 16, generator=draw) * 2 - 1
    latents = torch.randn(6, 8, 8, 8, generator=draw)
    return Batch(Draws(0, 3, ROWS), images, latents, method.teacher.condition(CAPTIONS), CAPTIONS)


def step(method: ControlNetTraining) -> dict[str, Tensor]:
    return method("control", batch(method), Progress(0, 1, {}), {})


def test_loss_is_the_epsilon_error_beside_the_controlnet(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline)
    teacher, given, draws = method.teacher, batch(method), Draws(0, 3, ROWS)
    assert given.latents is not None and given.images is not None and given.condition is not None
    mean, logvar = given.latents.chunk(2, dim=1)
    x0 = (mean + logvar.div(2).exp() * draws.normal(mean.shape[1:])) * teacher.vae.config.scaling_factor
    t = draws.integers(0, 1000)
    eps = draws.normal(x0.shape[1:])
    dropped = draws.uniform() < 0.5
    states = given.condition.arguments["encoder_hidden_states"].clone()
    states[dropped] = teacher.encode_prompts([""])["encoder_hidden_states"]
    abar = teacher.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    squares = (given.images / 2 + 0.5).unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5), keepdim=True)
    picture = squares.expand(-1, -1, -1, 4, -1, 4).reshape(6, 3, 16, 16)
    with torch.no_grad():
        down, mid = method.controlnet(x_t, t, states, controlnet_cond=picture, return_dict=False)
        output = teacher.pipeline.unet(
            x_t, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        plain = teacher.pipeline.unet(x_t, t, states).sample
    loss = step(method)["loss"].detach()
    torch.testing.assert_close(loss, (output - eps).square().mean(), rtol=2e-5, atol=1e-6)
    assert dropped.any() and not dropped.all()
    start = step(built(tiny_pipeline, moved=False))["loss"].detach()
    torch.testing.assert_close(start, (plain - eps).square().mean(), rtol=2e-5, atol=1e-6)
    assert abs(loss - start) > 1e-3


def test_the_controlnet_alone_has_a_gradient(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline)
    before = weights_hash(method.teacher.family.network)
    step(method)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.players()["control"])
    assert all(p.grad is None for module in method.teacher.modules() for p in module.parameters())
    assert weights_hash(method.teacher.family.network) == before


def test_export_is_stock_and_says_what_it_sees(tiny_pipeline: Path, tmp_path: Path) -> None:
    method = built(tiny_pipeline)
    export = method.export()
    export.model.save_pretrained(tmp_path)
    for part in export.beside:
        part.save_pretrained(tmp_path)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
    assert weights_hash(pipe.controlnet) == weights_hash(method.controlnet)
    assert export.sampling == {"default": {"guidance_scale": 3.0}}
    assert control_in(tmp_path) == SuperResolution(factor=4)
    assert json.loads((tmp_path / "control.json").read_text())["generator_hash"] == weights_hash(pipe.unet)


def test_pictures_follow_the_control(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline)
    rows = method.pictures(["cat", "dog"], 4)
    assert torch.equal(rows["20 steps"], method.pictures(["cat", "dog"], 4)["20 steps"])
    squares = rows["condition"].unflatten(2, (4, 4)).unflatten(4, (4, 4))
    assert torch.equal(squares.amax((3, 5)), squares.amin((3, 5)))
    assert (
        rows["20 steps"] - built(tiny_pipeline, moved=False).pictures(["cat", "dog"], 4)["20 steps"]
    ).abs().max() > 0.01


def test_an_image_prompt_is_no_picture_for_a_controlnet() -> None:
    method = {"name": "controlnet", "control": {"name": "image"}}
    with pytest.raises(UserError, match=r"method.control.name: there is no 'image'; there are canny, "):
        load_config({"output_dir": "runs/none", "data": {"name": "emoji"}, "method": method})


def test_a_student_is_refused(tiny_pipeline: Path) -> None:
    teacher = Teacher.load(TeacherSettings(str(tiny_pipeline)))
    with pytest.raises(UserError, match="student: the network is frozen"):
        ControlNetTraining(
            ControlNetSettings(control=SuperResolution()), Parts(teacher, StudentSettings(kind="lora"), [])
        )
