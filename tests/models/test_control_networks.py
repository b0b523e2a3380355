"""Controls that look through networks, with tiny ones saved to a folder: depth, HED, embeddings."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import HED, Depth, ImagePrompt
from fewstep.distill.scorers.vision import PlannedVision, Vision
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seen(control: Any, pictures: Tensor = PICTURES) -> Tensor:
    return control.load(Vision())(pictures, Draws(0, 0, range(len(pictures))))


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Depth Anything's architecture and processor, random and tiny."""
    folder = tmp_path_factory.mktemp("depth") / "model"
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(4)  # or all is as near
    network.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)
    return str(folder)


def test_depth_is_a_picture_from_far_to_near(depth_model: str) -> None:
    control = Depth(model=depth_model)
    found = seen(control)
    assert found.shape == PICTURES.shape and found.dtype == torch.float32
    assert torch.equal(found[:, 0], found[:, 1])
    assert found.amin((1, 2, 3)).tolist() == [0] * 3 and found.amax((1, 2, 3)).tolist() == [1] * 3
    torch.testing.assert_close(found[:1], seen(control, PICTURES[:1]), rtol=1e-4, atol=1e-4)
    network = DepthAnythingForDepthEstimation.from_pretrained(depth_model).eval()
    processor = DPTImageProcessor.from_pretrained(depth_model)
    pixels = processor(images=list(PICTURES), do_rescale=False, return_tensors="pt").pixel_values
    assert pixels.shape[-1] == 56 and pixels.std() > 0.3
    with torch.no_grad():
        depth = network(pixels).predicted_depth
    small = torch.nn.functional.interpolate(depth[:, None], (32, 32), mode="bilinear")[:, 0]
    correlation = torch.corrcoef(torch.stack([small[1].flatten(), found[1, 0].flatten()]))[0, 1]
    assert correlation > 0.999  # near stays bright


def test_a_frozen_network_of_a_control(depth_model: str) -> None:
    view: Any = Depth(model=depth_model).load(Vision())
    assert not any(p.requires_grad for p in view.parameters()) and not view.train().training
    draws = Draws(0, 0, range(3))
    plain = view(PICTURES.clone().requires_grad_(True), draws)
    assert not plain.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view(PICTURES, draws), plain)
    for p in view.network.parameters():
        p.zero_()  # all is as near
    assert view(PICTURES, draws).abs().max() == 0


def test_missing_networks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"method.control.model: no depth model can be read from"):
        seen(Depth(model=str(tmp_path)))
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("controlnet_aux"):
            raise ImportError("No module named 'controlnet_aux'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"hed needs controlnet-aux.*pip install 'fewstep\[controls\]', or choo"
    ):
        seen(HED(model=str(tmp_path)))


def test_hed_of_controlnet_aux(tmp_path: Path) -> None:
    """With random weights of the package's architecture; pictures smaller than it takes, and larger."""
    from controlnet_aux import hed

    with pytest.raises(UserError, match=r"method.control.model: no ControlNetHED.pth can be read from"):
        seen(HED(model=str(tmp_path)))
    torch.manual_seed(3)
    network = hed.ControlNetHED_Apache2()
    torch.save(network.state_dict(), tmp_path / "ControlNetHED.pth")
    control = HED(model=str(tmp_path))
    large = torch.rand(2, 3, 64, 64)
    for pictures in (PICTURES, large):
        found = seen(control, pictures)
        assert found.shape == pictures.shape and found.min() >= 0 and found.max() <= 1
        assert torch.equal(found, seen(control, pictures))
    with torch.no_grad():
        sides = [
            torch.nn.functional.interpolate(e, (64, 64), mode="bilinear")
            for e in network((large * 255).round())
        ]
    torch.testing.assert_close(found[:, :1], torch.stack(sides).mean(0).sigmoid(), rtol=0, atol=2 / 255)


def test_plans_ask_for_weights_and_read_none() -> None:
    vision = PlannedVision()
    with torch.device("meta"):
        pictures = torch.empty(2, 3, 512, 512)
        for control in (Depth(), HED()):
            view: Any = control.load(vision)
            assert view(pictures, Draws(0, 0, range(2))).shape == pictures.shape
        embedder: Any = ImagePrompt(encoder="h94/IP-Adapter/models/image_encoder").load(vision)
        assert embedder(pictures, Draws(0, 0, range(2))).shape == (2, 1024) and embedder.width == 1024
        lite: Any = ImagePrompt().load(vision)
        assert lite(pictures, Draws(0, 0, range(2))).shape == (2, 1280) and lite.width == 1280
    assert sum(p.numel() for p in embedder.parameters()) == 632_076_800
    assert vision.asked == [
        "depth model depth-anything/Depth-Anything-V2-Small-hf",
        "HED of lllyasviel/Annotators",
        "image encoder h94/IP-Adapter/models/image_encoder",
    ]


def test_an_encoder_below_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """owner/name/folder is the folder of owner/name; a plain folder is itself."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
        image_size=8, projection_dim=12,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config)
    network.save_pretrained(tmp_path / "vision")
    view: Any = ImagePrompt(encoder=str(tmp_path / "vision")).load(Vision())
    found = view(PICTURES, Draws(0, 0, range(3)))
    small = torch.nn.functional.interpolate(PICTURES, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = ((torch.tensor(v).view(3, 1, 1)) for v in view.image_input.values() if not isinstance(v, int))
    with torch.no_grad():
        expected = network.eval()((small - mean) / std).image_embeds
    torch.testing.assert_close(found, expected)
    asked: list[Any] = []
    monkeypatch.setattr(
        CLIPVisionModelWithProjection,
        "from_pretrained",
        lambda place, **given: asked.append((place, given["subfolder"])) or network,
    )
    ImagePrompt(encoder="h94/IP-Adapter/models/image_encoder").load(Vision())
    ImagePrompt(encoder="owner/name").load(Vision())
    assert asked == [("h94/IP-Adapter", "models/image_encoder"), ("owner/name", "")]
