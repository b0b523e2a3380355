"""Pipelines of one channel are scored as grey in three, and the numbers say so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DDPMScheduler
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.protocol import Score
from fewstep.distill.metrics.reference import reference
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.pipeline_source import QUANTISATION, PipelineSource, quantise

from ..tiny_classes import consistency_folder, tiny_unet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def scores_of(folder: Path, data_folder: Path, **changes: Any) -> list[Score]:
    arguments = {"data": str(data_folder), "num_images": 6, "steps": [1], "device": "cpu", "progress": False}
    return [Score.from_json(s) for s in evaluate(str(folder), **(arguments | changes))["rows"][0]["scores"]]


def test_one_channel_is_repeated_and_named(
    tmp_path: Path, data_folder: Path, extractor: EfficientNetLite0
) -> None:
    folder = consistency_folder(tmp_path / "grey", channels=1)
    pipe = ConsistencyModelPipeline.from_pretrained(folder)
    draws = [torch.Generator().manual_seed(i) for i in range(6)]
    made = pipe(batch_size=6, generator=draws, output_type="pt").images
    assert made.shape == (6, 1, 16, 16)
    grey = quantise(made).repeat(1, 3, 1, 1)
    real = Moments.of(extract(extractor, reference(str(data_folder), "train", 16)[0]))
    scores = scores_of(folder, data_folder)
    (distance,) = (s for s in scores if s.protocol.metric == "FD")
    assert distance.value == pytest.approx(frechet_distance(real, Moments.of(extract(extractor, grey))), 1e-5)
    assert {s.protocol.input for s in scores} == {f"{QUANTISATION}; grey repeated to RGB"}
    assert scores_of(folder, data_folder) == scores  # now from the cache
    colour = scores_of(consistency_folder(tmp_path / "colour"), data_folder)
    assert {s.protocol.input for s in colour} == {QUANTISATION}


def test_arrays_of_one_channel(tmp_path: Path, data_folder: Path) -> None:
    """DDPMPipeline gives numpy (B, H, W, 1)."""
    DDPMPipeline(tiny_unet(channels=1), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    source = PipelineSource(str(tmp_path / "ddpm"), CPU)
    made, _ = source.pictures(range(2), Inputs(), 0, {"num_inference_steps": 2})
    assert made.shape == (2, 3, 16, 16) and made.dtype == torch.uint8 and source.grey
    assert torch.equal(made[:, 0], made[:, 2]) and made.float().std() > 10
    found = scores_of(tmp_path / "ddpm", data_folder, steps=[2])
    assert found[0].protocol.input.endswith("; grey repeated to RGB")


def test_two_channels_are_no_picture(tmp_path: Path) -> None:
    source = PipelineSource(str(consistency_folder(tmp_path / "two", channels=2)), CPU)
    with pytest.raises(UserError, match="gives neither RGB nor grey pictures"):
        source.pictures(range(2), Inputs(), 0, {"num_inference_steps": 1})
