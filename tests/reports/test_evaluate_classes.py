"""Pipelines that are conditioned on classes: which label each picture gets, and what its numbers say of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
)
from fewstep.distill.errors import UserError
from fewstep.distill.metrics import reference
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.protocol import Score, hash_prompts, same_protocol
from fewstep.distill.reports.anchors import caption_match
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.pipeline_source import PipelineSource, quantise
from fewstep.distill.scorers.image_text import pair_cosines
from fewstep.distill.scorers.lite_minilm import LiteMiniLM
from torch import Tensor

from ..tiny_classes import CLASSES, class_data, consistency_folder

CPU = torch.device("cpu")
ORDER = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
LABELS = [ORDER[i % 7] % 3 for i in range(10)]  # row i of class_data is of class i mod 3


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "load_data", class_data)


def scores_of(folder: Path, **changes: Any) -> list[Score]:
    arguments = {"data": "classes", "num_images": 10, "steps": [1], "batch_size": 4, "device": "cpu"}
    report = evaluate(str(folder), progress=False, **(arguments | changes))
    return [Score.from_json(s) for s in report["rows"][0]["scores"]]


def by_stock_pipeline(folder: Path, labels: list[int]) -> Tensor:
    """Picture i of noise seed i and labels[i], made alone."""
    pipe = ConsistencyModelPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    made = []
    for i, label in enumerate(labels):
        draw = torch.Generator().manual_seed(i)
        made.append(pipe(class_labels=label, generator=draw, output_type="pt").images)
    return quantise(torch.cat(made))


def test_picture_i_has_the_class_of_reference_row_i(tmp_path: Path, extractor: EfficientNetLite0) -> None:
    folder = consistency_folder(tmp_path / "cm", classes=3)
    scores = scores_of(folder)
    real = Moments.of(extract(extractor, class_data("classes", split="train", resolution=16).images(ORDER)))

    def distance(labels: list[int]) -> float:
        return frechet_distance(Moments.of(extract(extractor, by_stock_pipeline(folder, labels))), real)

    (found,) = (s for s in scores if s.protocol.metric == "FD")
    assert found.value == pytest.approx(distance(LABELS), rel=1e-4)
    in_file_order = [i % 7 % 3 for i in range(10)]
    assert found.value != pytest.approx(distance(in_file_order), rel=1e-3)


def test_numbers_say_that_they_are_of_classes(tmp_path: Path) -> None:
    scores = scores_of(consistency_folder(tmp_path / "cm", classes=4))  # the fourth: a null class
    assert {s.protocol.conditioning for s in scores} == {"class"}
    assert {s.protocol.prompts_sha256 for s in scores} == {hash_prompts(LABELS)}
    assert "caption match" not in [s.name for s in scores]
    plain = scores_of(consistency_folder(tmp_path / "plain"))
    assert {(s.protocol.conditioning, s.protocol.prompts_sha256) for s in plain} == {("none", "")}
    with pytest.raises(UserError, match="not comparable, conditioning differs: 'class' and 'none'"):
        same_protocol([scores[0], plain[0]])
    with pytest.raises(UserError, match="takes no prompts"):
        caption_match(str(tmp_path / "cm"), steps=1, data="classes", device="cpu", progress=False)


def test_evaluations_seconds_and_memory_are_counted(tmp_path: Path) -> None:
    folder = consistency_folder(tmp_path / "cm", classes=3)
    how = {"data": "classes", "num_images": 6, "batch_size": 4, "device": "cpu", "progress": False}
    rows = evaluate(str(folder), steps=[1, 2], **how)["rows"]
    assert [(r["steps"], r["nfe"]) for r in rows] == [(1, 1), (2, 2)]
    assert all(r["seconds_per_image"] > 0 and r["peak_memory"]["bytes"] > 1e8 for r in rows)


def test_too_few_classes_are_refused(tmp_path: Path) -> None:
    folder = consistency_folder(tmp_path / "cm", classes=2)
    with pytest.raises(UserError, match="knows 2 classes, classes has 3; give the data") as caught:
        scores_of(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no class labels"):
        scores_of(folder, data="plain")


def test_other_labels_are_not_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = consistency_folder(tmp_path / "cm", classes=3)
    before = scores_of(folder)
    assert scores_of(folder) == before

    def turned(name: str, **how: Any) -> Any:
        data = class_data(name, **how)
        data.rows = data.rows[1:] + data.rows[:1]
        return data

    monkeypatch.setattr(reference, "load_data", turned)
    after = scores_of(folder)
    assert after[0].protocol.reference_sha256 == before[0].protocol.reference_sha256
    assert after[0].protocol.id != before[0].protocol.id and after[0].value != before[0].value


def test_a_transformer_that_needs_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    side = {"sample_size": 4, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 1}
    transformer = DiTTransformer2DModel(
        **side, num_layers=1, in_channels=4, out_channels=4, num_embeds_ada_norm=3
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    source = PipelineSource(str(tmp_path / "dit"), CPU)
    assert (source.conditioning, source.num_classes) == ("class", 3)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    made, _ = source.pictures(range(2, 4), Inputs("class", [0, 1, 2]), 0, call)  # labels 2 and 0
    assert source.evaluations() == 4
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "dit")
    pipe.set_progress_bar_config(disable=True)

    def alone(seed: int, label: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return quantise(pipe([label], generator=draw, output_type="pt", **call).images)[0].int()

    for picture, seed, label in zip(made.int(), (2, 3), (2, 0), strict=True):
        assert (picture - alone(seed, label)).abs().max() <= 1
        assert (picture - alone(seed, 1)).abs().max() > 2
    scores = scores_of(tmp_path / "dit", guidance_scale=1.0)
    assert {s.protocol.conditioning for s in scores} == {"class"}
    with pytest.raises(UserError, match="DiTPipeline refuses the call \\(index out of range"):
        scores_of(tmp_path / "dit")  # its guidance takes class 1000 for none


def test_image_text_score_is_with_the_names_of_the_classes(tmp_path: Path, lite0: LiteMiniLM) -> None:
    folder = consistency_folder(tmp_path / "cm", classes=3)
    found = scores_of(folder, clip="lite0-minilm")[-1]
    captions = [CLASSES[label] for label in LABELS]
    cosines = pair_cosines(lite0, by_stock_pipeline(folder, LABELS), captions)
    assert found.name == "image-text cosine lite0-minilm"
    assert found.value == pytest.approx(float(cosines.mean()), abs=1e-4)
    assert found.protocol.prompts_sha256 == hash_prompts(LABELS) != found.protocol.reference_sha256
    with pytest.raises(UserError, match="no captions to score pictures with"):
        scores_of(consistency_folder(tmp_path / "plain"), clip="lite0-minilm")
