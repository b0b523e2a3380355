"""Scores against conditions: what a control sees of the reference, for pipelines with a ControlNet and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import Canny, Inpainting, SuperResolution
from fewstep.distill.metrics.reference import places_of, reference
from fewstep.distill.reports.compare import compare
from fewstep.distill.reports.conditions import Conditions, control_in, read_control
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.judges import DataJudge, inputs_for
from fewstep.distill.reports.opening import open_source
from fewstep.distill.reports.table import by_column

CPU = torch.device("cpu")
SUPERRES = SuperResolution(factor=4)
LAW = "caption, superres(factor=4)"


@pytest.fixture(scope="module")
def controlled(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a random ControlNet that says what it sees."""
    folder = tmp_path_factory.mktemp("controlled") / "pipeline"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    with torch.no_grad():
        for p in controlnet.parameters():
            p.add_(0.1 * torch.randn_like(p))
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    ).save_pretrained(folder)
    (folder / "control.json").write_text(json.dumps({"control": {"name": "superres", "factor": 4}}))
    return folder


def scored(pipeline: Path, data: Path, **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_images": 8, "steps": [1], "batch_size": 4, "device": "cpu"}
    return evaluate(str(pipeline), data=str(data), progress=False, **{**arguments, **options})


def test_conditions_are_views_of_the_reference(data_folder: Path) -> None:
    real, _ = reference(str(data_folder), "train", 16)
    conditions = Conditions(SUPERRES, places_of(str(data_folder), "train"))
    seen = conditions.of(range(3, 14), 16)
    rows = [i % 12 for i in range(3, 14)]
    assert torch.equal(conditions.real(range(3, 14), 16), real[rows])
    squares = (real[rows].float() / 255).unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5))
    assert torch.allclose(seen[..., ::4, ::4], squares, atol=1e-6)
    assert conditions.name == "superres(factor=4)"


def test_the_error_is_a_mean_over_pixels(data_folder: Path) -> None:
    real, _ = reference(str(data_folder), "train", 16)
    conditions = Conditions(SUPERRES, places_of(str(data_folder), "train"))
    assert conditions.errors(real[:4], range(4)).abs().max() == 0
    brighter = real[:4].clone()
    brighter[1, 0, :8] = (brighter[1, 0, :8].int() + 51).clamp(max=255).byte()
    added = (brighter[1].int() - real[1].int()).float().mean() / 255
    errors = conditions.errors(brighter, range(4))
    assert errors[[0, 2, 3]].abs().max() == 0
    assert errors[1].item() == pytest.approx(added.item(), rel=1e-5)
    assert conditions.errors(real[1:5], range(4)).min() > 0  # of other pictures than the conditions'


def test_a_mask_belongs_to_the_picture(data_folder: Path) -> None:
    conditions = Conditions(Inpainting(), places_of(str(data_folder), "train"))
    masks = conditions.of(range(4), 16) == -1
    assert masks.any((1, 2, 3)).all() and not torch.equal(masks[0], masks[1])
    assert torch.equal(conditions.of(range(2, 4), 16) == -1, masks[2:])
    grey = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    difference = (conditions.real(range(4), 16).float() / 255 - 128 / 255).abs()
    expected = torch.where(masks, 0, difference).mean((1, 2, 3))
    assert torch.allclose(conditions.errors(grey, range(4)).float(), expected, atol=1e-6)


def test_identity_follows_control_and_pictures(data_folder: Path) -> None:
    train, other = (places_of(str(data_folder), s) for s in ("train", "holdout"))
    one = Conditions(SUPERRES, train).identity(range(4))
    assert Conditions(SUPERRES, train).identity(range(4)) == one
    assert one not in {
        Conditions(SuperResolution(factor=2), train).identity(range(4)),
        Conditions(SUPERRES, other).identity(range(4)),
        Conditions(SUPERRES, train).identity(range(1, 5)),
    }


def test_a_control_is_named_or_written_out(tmp_path: Path) -> None:
    assert read_control("canny") == Canny()
    assert read_control("{name: canny, low: 50}") == Canny(low=50)
    assert control_in(tmp_path) is None
    for text, message in (
        ("cany", r"control.*cany"),
        ("{name: canny, lo: 50}", "control.lo: no such key; the nearest is low"),
        ("{name: [", "not readable YAML"),
    ):
        with pytest.raises(UserError, match=message):
            read_control(text)


def test_a_controlled_pipeline_sees_the_conditions(controlled: Path, data_folder: Path) -> None:
    source = open_source(str(controlled), CPU)
    judge = DataJudge(str(data_folder), "train", None, "efflite0-128", CPU, 4, None)
    inputs = inputs_for(judge, source, 8)
    assert inputs.law == LAW and inputs.controlled
    call = source.calls([1], 1, None, 8)[1]
    images, _ = source.pictures(range(2, 5), inputs, 0, call)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(controlled)
    pipe.set_progress_bar_config(disable=True)
    assert inputs.conditions is not None
    expected = pipe(
        inputs.of(range(2, 5)),
        image=inputs.conditions.of(range(2, 5), 16),
        generator=[torch.Generator().manual_seed(i) for i in range(2, 5)],
        output_type="pt",
        **call,
    ).images
    assert torch.equal(images, (expected * 255).round().byte())
    shifted, _ = source.pictures(range(2, 5), inputs_for(judge, source, 8, SUPERRES), 0, call)
    assert torch.equal(shifted, images)
    with pytest.raises(UserError, match="control: the pipeline was trained with"):
        inputs_for(judge, source, 8, Canny())


def test_the_report_holds_the_condition_error(
    controlled: Path, tiny_pipeline: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Of the pipeline with the control, and of the one without, which is scored against the same conditions."""
    report = scored(controlled, data_folder)
    row = by_column(report["rows"][0])
    assert {s.protocol.conditioning for s in row.values()} == {LAW} and "caption match" in row
    plain = by_column(scored(tiny_pipeline, data_folder, control=SUPERRES)["rows"][0])
    assert {s.protocol.conditioning for s in plain.values()} == {"caption"}
    judge = DataJudge(str(data_folder), "train", None, "efflite0-128", CPU, 4, None)
    for folder, found in ((controlled, row), (tiny_pipeline, plain)):
        source = open_source(str(folder), CPU)
        inputs = inputs_for(judge, source, 8, SUPERRES)
        assert inputs.conditions is not None
        call, errors = source.calls([1], 1, None, 8)[1], []
        # In the report's batches: others may round a pixel to the next of 255 levels. Equal but for a mean in float64.
        for rows in (range(4), range(4, 8)):
            errors.append(inputs.conditions.errors(source.pictures(rows, inputs, 0, call)[0], rows))
        error = torch.cat(errors).mean().item()
        assert found["condition error"].value == pytest.approx(error, rel=1e-12) and error > 0.01
    assert "condition error" not in by_column(scored(tiny_pipeline, data_folder)["rows"][0])


def test_both_stand_on_one_page(
    controlled: Path, tiny_pipeline: Path, data_folder: Path, tmp_path: Path, scored_here: None
) -> None:
    record = compare(
        [f"nct={controlled}", f"generator={tiny_pipeline}"], tmp_path, steps=[1], teacher="none",
        data=str(data_folder), num_images=8, seeds=2, device="cpu",
        options=["--batch_size", "4", "--control", "{name: superres, factor: 4}"],
    )  # fmt: skip
    text = (tmp_path / "compare.md").read_text()
    assert "| made from |" in text and f"| {LAW} |" in text and "| caption |" in text
    assert f"conditioning: {LAW}; caption;" in text
    (strips,) = record["strips"]
    assert [(p["model"], p["steps"]) for p in strips["pictures"]] == [
        ("nct", None),
        ("nct", 1),
        ("generator", 1),
    ]
    assert "nct, condition" in (tmp_path / "compare.html").read_text()


def test_what_has_no_conditions(
    controlled: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = tmp_path / "pipeline"
    nameless.mkdir()
    for part in controlled.iterdir():
        if part.name != "control.json":
            (nameless / part.name).symlink_to(part)
    call = ["--num_images", "4", "--steps", "1", "--batch_size", "4"]
    assert main(["evaluate", str(nameless), "--data", str(data_folder), *call]) == 2
    assert "give what it sees, --control canny" in capsys.readouterr().err
    flag = ["--control", "{name: superres, factor: 4}"]
    assert main(["evaluate", str(nameless), "--data", str(data_folder), *call, *flag]) == 0
    assert LAW in capsys.readouterr().out
