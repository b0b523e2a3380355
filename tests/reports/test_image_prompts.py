"""Scores of pipelines with an IP-Adapter: embeddings of the reference's pictures as conditions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import Canny, ImagePrompt
from fewstep.distill.methods.control.nct import NCT
from fewstep.distill.methods.control.settings import NCTSettings
from fewstep.distill.metrics.features import make_extractor
from fewstep.distill.metrics.reference import places_of, reference
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.reports.conditions import Conditions, control_in
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.judges import DataJudge, inputs_for
from fewstep.distill.reports.opening import open_source
from fewstep.distill.reports.table import by_column
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Parts
from fewstep.pipelines.export import write_export
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

CPU = torch.device("cpu")
LAW = "caption, image(encoder=efflite0)"


def exported(teacher: Path, folder: Path, **control: str) -> Path:
    """NCT's export with an adapter that matters."""
    torch.manual_seed(0)
    settings = NCTSettings(control={"name": "image", **control})
    method = NCT(settings, Parts(Teacher.load(TeacherSettings(str(teacher))), StudentSettings(), []))
    with torch.no_grad():
        for p in method.players()["control"]:
            p.add_(0.3 * torch.randn_like(p))
    folder.mkdir()
    write_export(method.export(), folder)
    return folder


@pytest.fixture(scope="module")
def prompted(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_pipeline, tmp_path_factory.mktemp("prompted") / "pipeline")


def judge_of(data: Path) -> DataJudge:
    return DataJudge(str(data), "train", None, "efflite0-128", CPU, 4, None)


def test_the_error_is_one_minus_the_cosine(data_folder: Path) -> None:
    real, _ = reference(str(data_folder), "train", 16)
    conditions = Conditions(ImagePrompt(), places_of(str(data_folder), "train"))
    assert conditions.errors(real[:4], range(4)).abs().max() < 1e-6
    features = make_extractor("efflite0-128")(real[:5]).double()
    expected = 1 - torch.nn.functional.cosine_similarity(features[:4], features[1:])
    found = conditions.errors(real[1:5], range(4))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.min() > 1e-3
    assert torch.equal(conditions.shown(range(2, 4), 16), real[2:4].float() / 255)


def test_each_picture_has_its_own_prompt(prompted: Path, data_folder: Path) -> None:
    source = open_source(str(prompted), CPU)
    inputs = inputs_for(judge_of(data_folder), source, 8)
    assert inputs.law == LAW and inputs.controlled and inputs.conditions is not None
    call = source.calls([1], 1, None, 8)[1]
    images, _ = source.pictures(range(2, 5), inputs, 0, call)
    assert source.evaluations() == 3
    pipe = StableDiffusionPipeline.from_pretrained(prompted)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(
        str(prompted), subfolder="ip_adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    seen = inputs.conditions.of(range(8), 16)

    def made(prompt: int) -> torch.Tensor:
        out = pipe(
            inputs.of(range(3, 4)), ip_adapter_image_embeds=[seen[prompt][None, None]], output_type="pt",
            generator=[torch.Generator().manual_seed(3)], **call,
        ).images  # fmt: skip
        return (out * 255).round().byte()[0]

    assert torch.equal(images[1], made(3)) and not torch.equal(images[1], made(4))
    again, _ = source.pictures(range(3, 4), inputs, 0, call)
    assert torch.equal(again[0], images[1])


def test_the_report_says_what_its_error_is(prompted: Path, tiny_pipeline: Path, data_folder: Path) -> None:
    options: dict[str, Any] = {
        "num_images": 8,
        "steps": [1],
        "batch_size": 4,
        "device": "cpu",
        "progress": False,
    }
    found = by_column(evaluate(str(prompted), data=str(data_folder), **options)["rows"][0])
    score = found["condition error"]
    assert score.protocol.definition.startswith("1 - cosine") and score.protocol.conditioning == LAW
    assert score.protocol.extractor == "image(encoder=efflite0)" and 0 < score.value < 1
    plain = evaluate(str(tiny_pipeline), data=str(data_folder), control=ImagePrompt(), **options)
    assert by_column(plain["rows"][0])["condition error"].protocol.conditioning == "caption"
    conditions = Conditions(Canny(), places_of(str(data_folder), "train"))
    assert conditions.control.definition.startswith("mean absolute difference")


def test_an_encoder_of_a_folder_comes_along(tiny_pipeline: Path, data_folder: Path, tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
        image_size=16, projection_dim=24,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    folder = exported(tiny_pipeline, tmp_path / "pipeline", encoder=str(tmp_path / "clip"))
    assert (
        json.loads((folder / "control.json").read_text())["control"]["encoder"] == "ip_adapter/image_encoder"
    )
    shutil.rmtree(tmp_path / "clip")
    moved = folder.rename(tmp_path / "elsewhere")
    assert control_in(moved) == ImagePrompt(encoder=str(moved / "ip_adapter" / "image_encoder"))
    source = open_source(str(moved), CPU)
    inputs = inputs_for(judge_of(data_folder), source, 4)
    assert inputs.conditions is not None and inputs.conditions.of(range(3), 16).shape == (3, 24)
    images, _ = source.pictures(range(2), inputs, 0, source.calls([1], 1, None, 4)[1])
    assert images.shape == (2, 3, 16, 16)


def test_the_command_line(
    prompted: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--data", str(data_folder), "--num_images", "4", "--batch_size", "4"]
    assert main(["evaluate", str(prompted), "--steps", "1", *call]) == 0
    assert LAW in capsys.readouterr().out
    assert main(["sample", str(prompted), "--steps", "1", *call, "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert main(["evaluate", str(prompted), "--steps", "1", *call, "--control", "canny"]) == 2
    assert "control: the pipeline was trained with" in capsys.readouterr().err
    assert main(["evaluate", str(prompted), "--steps", "1", *call, "--guidance_scale", "3"]) == 2
    assert "guidance_scale: 3.0 needs a picture to guide away from" in capsys.readouterr().err


def test_a_broken_or_nameless_adapter(prompted: Path, data_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(prompted, broken)
    (broken / "control.json").unlink()
    source = open_source(str(broken), CPU)
    with pytest.raises(UserError, match="control: the pipeline has an adapter and names no control"):
        inputs_for(judge_of(data_folder), source, 4)
    inputs = inputs_for(judge_of(data_folder), source, 4, Canny())
    with pytest.raises(UserError, match="refuses the call"):
        source.pictures(range(2), inputs, 0, source.calls([1], 1, None, 4)[1])
    (broken / "ip_adapter" / "ip_adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"ip_adapter/ip_adapter.safetensors cannot be loaded"):
        open_source(str(broken), CPU)
