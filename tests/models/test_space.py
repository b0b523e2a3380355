"""Spaces: what a method denoises and tells its network, in latents, in colour and in grey pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.space import LatentSpace, PixelSpace, latent_space, pixel_space
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts

CLASSES = ("bag", "coat", "shirt")
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 2,
    "add_attention": False,
}


def network(channels: int = 3, **config: Any) -> UNet2DModel:
    return UNet2DModel(**{**TINY, "in_channels": channels, "out_channels": channels, **config})


def parts(classes: tuple[str, ...] = (), resolution: int | None = 8) -> Parts:
    return Parts(None, StudentSettings(), [], classes, resolution)


def batch(condition: Condition | None = None) -> Batch:
    return Batch(Draws(0, 0, range(2)), images=torch.randn(2, 3, 8, 8), condition=condition)


def test_coloured_pixels_are_the_pictures_themselves() -> None:
    space = pixel_space(network(), parts())
    given = batch()
    assert space.samples(given) is given.images
    assert space.shape == (3, 8, 8) and space.needs == {"images"} and space.classes == ()
    x0 = torch.randn(2, 3, 8, 8)
    assert torch.equal(space.decode(x0), x0)


def test_grey_pixels_are_the_mean_of_the_colours_and_shown_as_three() -> None:
    space = pixel_space(network(1), parts())
    given = batch()
    assert given.images is not None
    grey = space.samples(given)
    assert grey.shape == (2, 1, 8, 8) and space.shape == (1, 8, 8)
    torch.testing.assert_close(grey[:, 0], (given.images[:, 0] + given.images[:, 1] + given.images[:, 2]) / 3)
    shown = space.decode(grey)
    assert shown.shape == (2, 3, 8, 8) and all(torch.equal(shown[:, i], grey[:, 0]) for i in range(3))


def test_classes_are_told_by_the_order_of_their_labels() -> None:
    space = pixel_space(network(num_class_embeds=3), parts(CLASSES))
    assert space.needs == {"images", "labels"} and space.classes == CLASSES
    condition = space.condition(["shirt", "bag", "shirt"])
    assert condition.arguments["class_labels"].tolist() == [2, 0, 2] and condition.empty == {}
    with pytest.raises(UserError, match="'hat' is none of the classes: bag, coat, shirt"):
        space.condition(["bag", "hat"])
    labels = Condition({"class_labels": torch.tensor([1, 1])}, {})
    assert space.told(batch(labels)) is labels


def test_an_unconditional_network_is_told_nothing_whatever_the_captions() -> None:
    space = pixel_space(network(), parts(CLASSES))
    assert space.classes == () and space.needs == {"images"}
    for told in (space.condition(["hat"]), space.told(batch())):
        assert told.arguments == {} and told.empty == {}


def test_a_network_may_have_room_for_more_classes_than_the_data_and_no_fewer() -> None:
    assert pixel_space(network(num_class_embeds=4), parts(CLASSES)).classes == CLASSES
    with pytest.raises(
        UserError, match=r"student\.network\.num_class_embeds: 2, but the data have 3 classes"
    ):
        pixel_space(network(num_class_embeds=2), parts(CLASSES))


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, {"resolution": 16}, "resolution: 16, but the network's sample_size is 8; make them equal"),
        ({"num_class_embeds": 3}, {}, r"data\.name: the network tells 3 classes apart, the data name none"),
        ({"channels": 2}, {}, "network: in_channels 2: pixels have 3 channels, grey ones 1"),
    ],
)
def test_networks_that_do_not_fit_the_pixels_are_refused(
    config: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pixel_space(network(**config), parts(**given))
    assert "\n" not in str(caught.value)


def test_an_unknown_resolution_is_the_networks() -> None:
    assert pixel_space(network(), parts(resolution=None)).shape == (3, 8, 8)


def test_a_network_of_prompts_does_not_work_on_pixels(tiny_pipeline: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet")
    with pytest.raises(UserError, match="a UNet2DConditionModel does not work on pixels"):
        pixel_space(unet, parts())
    with pytest.raises(UserError, match="network: in_channels 4"):
        PixelSpace((4, 8, 8))


def test_latents_are_the_teachers(tiny_pipeline: Path) -> None:
    """A sample of the posterior in the diffusion model's units, its text states and its decoder."""
    teacher = Teacher.load(TeacherSettings(path=str(tiny_pipeline)))
    assert isinstance(teacher, LatentTeacher)
    space = latent_space(teacher.pipeline.unet, teacher)
    assert (
        isinstance(space, LatentSpace) and space.shape == (4, 8, 8) and space.needs == {"latents", "prompts"}
    )
    posterior = torch.randn(2, 8, 8, 8)
    x0 = space.samples(Batch(Draws(1, 0, range(2)), latents=posterior))
    mean, logvar = posterior.chunk(2, dim=1)
    expected = 0.18215 * (mean + (logvar / 2).exp() * Draws(1, 0, range(2)).normal((4, 8, 8)))
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-6)
    told, states = space.condition(["red cat", "dog"]), teacher.encode_prompts(["red cat", "dog"])
    assert torch.equal(told.arguments["encoder_hidden_states"], states["encoder_hidden_states"])
    assert torch.equal(space.decode(x0), teacher.decode(x0)) and space.decode(x0).shape == (2, 3, 16, 16)
