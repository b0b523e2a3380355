"""What controls see of a picture, by hand."""

from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import (
    Canny,
    Control,
    Inpainting,
    Luminance,
    SoftEdges,
    SuperResolution,
)
from pydantic import TypeAdapter
from torch import Tensor

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def step(side: int = 16, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Grey, `low` in the left half and `high` in the right."""
    picture = torch.full((1, 3, side, side), low)
    picture[..., side // 2 :] = high
    return picture


def seen(control: Any, pictures: Tensor, iteration: int = 0) -> Tensor:
    return control(pictures, Draws(0, iteration, range(len(pictures))))


@pytest.mark.parametrize("control", [Canny(), SoftEdges(), Luminance(), SuperResolution(factor=4)])
def test_conditions_are_pictures_and_no_draw_changes_them(control: Any) -> None:
    found = seen(control, PICTURES)
    assert found.shape == PICTURES.shape and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.01
    assert torch.equal(found, seen(control, PICTURES, iteration=1))
    assert torch.equal(found[:1], seen(control, PICTURES[:1]))


def test_canny_marks_the_edge_and_obeys_its_thresholds() -> None:
    edges = seen(Canny(), step())
    assert edges.unique().tolist() == [0, 1]
    columns = edges[0, 0].sum(0)
    assert columns.argmax() in (7, 8) and (columns > 0).sum() == 1
    assert seen(Canny(), step(high=0.15)).sum() == 0  # 4 x 38 is below 200
    assert seen(Canny(low=10, high=20), step(high=0.15)).sum() > 0


def test_soft_edges_are_strongest_at_the_edge() -> None:
    edges = seen(SoftEdges(), step())
    assert edges[0, 0, 8].argmax() in (7, 8)
    assert edges[0, 0, :, :3].max() == 0
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(seen(SoftEdges(), ramp)[..., 8, 8], torch.full((1, 3), 2 / 15))
    torch.testing.assert_close(seen(SoftEdges(), ramp.mT), seen(SoftEdges(), ramp).mT)


def test_luminance_by_hand() -> None:
    picture = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    assert seen(Luminance(), picture).flatten().tolist() == pytest.approx([0.299 + 0.2935 + 0.0285] * 3)


def test_super_resolution_averages_squares() -> None:
    found = seen(SuperResolution(factor=8), PICTURES)
    assert torch.equal(found[:, :, :8, 8:], found[:, :, :1, 8:9].expand(2, 3, 8, 8))
    torch.testing.assert_close(found[:, :, 0, 8], PICTURES[:, :, :8, 8:].mean((2, 3)))
    with pytest.raises(
        UserError, match=r"method.control.factor: 3 does not divide pictures of 16 x 16 pixels"
    ):
        seen(SuperResolution(factor=3), PICTURES)


def test_a_mask_hides_one_rectangle_and_shows_the_rest() -> None:
    control = Inpainting(min_side=0.25, max_side=0.5)
    for iteration in range(20):
        found = seen(control, PICTURES, iteration)
        hidden = found == -1
        assert torch.equal(found[~hidden], PICTURES[~hidden])
        for mask in hidden[:, 0]:
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns)
            for inside in (rows, columns):
                places = inside.nonzero()
                assert 4 <= len(places) <= 8 and places.max() - places.min() == len(places) - 1
    assert not torch.equal(hidden, seen(control, PICTURES) == -1)


def test_a_control_is_chosen_by_name() -> None:
    adapter = TypeAdapter(Control)
    assert adapter.validate_python({"name": "superres", "factor": 4}) == SuperResolution(factor=4)
    assert adapter.validate_python({"name": "inpaint"}) == Inpainting()
