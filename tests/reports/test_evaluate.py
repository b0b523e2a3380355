"""From a real tiny pipeline or a folder of files to a report."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.kid import kid
from fewstep.distill.metrics.manifold import manifold
from fewstep.distill.metrics.protocol import Score
from fewstep.distill.metrics.reference import reference
from fewstep.distill.reports.anchors import caption_match, real_floor
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.opening import open_source
from fewstep.distill.reports.pipeline_source import PipelineSource, hash_parts, quantise
from fewstep.distill.reports.report import read_report
from fewstep.distill.training.measure import PeakMemory
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

CPU = torch.device("cpu")


def pictures(
    source: PipelineSource, arguments: dict, batch_size: int, count: int = 5, seed_block: int = 0
) -> torch.Tensor:
    prompts, rows = ["red cat", "dog", "cat"], range(count)
    batches = [rows[i : i + batch_size] for i in range(0, count, batch_size)]
    return torch.cat(
        [source.pictures(b, Inputs.of_captions(prompts), seed_block, arguments)[0] for b in batches]
    )


def counted(patch: pytest.MonkeyPatch) -> list[range]:
    """The rows of every call of a pipeline from here on."""
    calls, plain = [], PipelineSource.pictures

    def pictures(self: PipelineSource, rows: range, *arguments: object) -> object:
        calls.append(rows)
        return plain(self, rows, *arguments)

    patch.setattr(PipelineSource, "pictures", pictures)
    return calls


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may change."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


def test_each_picture_has_its_seed_and_prompt_whatever_the_batch(tiny_pipeline: Path) -> None:
    source = PipelineSource(str(tiny_pipeline), CPU)
    arguments = source.arguments(2, 3.0)
    one, three = (pictures(source, arguments, b) for b in (1, 3))
    assert (one.int() - three.int()).abs().max() <= 1
    assert one.shape == (5, 3, 16, 16) and one.float().std() > 1
    other = pictures(source, arguments, 3, seed_block=1)
    assert (one.int() - other.int()).abs().amax((1, 2, 3)).min() > 5

    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(1_000_004)
    same = pipe("dog", num_inference_steps=2, guidance_scale=3.0, generator=draw, output_type="np").images[0]
    assert np.abs(same.transpose(2, 0, 1) * 255 - other[4].numpy()).max() <= 1


def test_pictures_are_rounded_and_clipped() -> None:
    x = torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 254.4 / 255, 254.6 / 255, 1.1])
    assert quantise(x).tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_evaluate_reports_what_its_parts_give(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path, extractor: EfficientNetLite0
) -> None:
    output = tmp_path / "out" / "report.json"
    report = evaluate(
        str(tiny_pipeline),
        data=str(data_folder),
        num_images=14,
        steps=[2, 1],
        seeds=2,
        batch_size=5,
        device="cpu",
        output=output,
        guidance_scale=2.0,
        progress=False,
    )
    assert read_report(output) == json.loads(json.dumps(report))
    assert str(tmp_path) not in output.read_text() and str(data_folder) not in output.read_text()
    assert [(r["steps"], r["nfe"]) for r in report["rows"]] == [(2, 4), (1, 2)]  # guidance takes two a step
    assert report["rows"][0]["arguments"] == {"num_inference_steps": 2, "guidance_scale": 2.0}
    assert all(r["seconds_per_image"] > 0 for r in report["rows"])
    memory = [r["peak_memory"] for r in report["rows"]]
    assert all(m["bytes"] > 1e8 and m["measure"] == "resident memory of the process" for m in memory)

    train, captions = reference(str(data_folder), "train", 16)
    unseen, _ = reference(str(data_folder), "holdout", 16)
    source = PipelineSource(str(tiny_pipeline), CPU)
    prompts = [captions[i % 12] for i in range(14)]
    runs = []
    for seed in (0, 1):
        call = {"num_inference_steps": 1, "guidance_scale": 2.0}
        made = [
            source.pictures(range(14)[i : i + 5], Inputs.of_captions(prompts), seed, call)[0]
            for i in (0, 5, 10)
        ]
        runs.append(extract(extractor, torch.cat(made)))
    real, held = extract(extractor, train), extract(extractor, unseen)
    scores = [Score.from_json(s) for s in report["rows"][1]["scores"]]
    names = [
        "KID-efflite0-128",
        "KID-efflite0-128",
        "FD-efflite0-128",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    assert [s.name for s in scores] == [*names, "NN ratio", "caption match"]
    equal = [manifold(real, x[:12]) for x in runs]
    assert [s.value for s in scores[3:7]] == pytest.approx(np.mean(equal, 0).tolist())
    assert [(s.protocol.n_ref, s.protocol.n_gen) for s in scores[3:7]] == [(12, 12)] * 4
    assert scores[3].protocol.reference.endswith("first 12")
    del scores[3:7]
    kids = torch.tensor([kid(real, x) for x in runs], dtype=torch.float64)
    assert scores[0].value == pytest.approx(kids.mean().item(), rel=1e-5)
    assert scores[0].sd == pytest.approx(kids.std().item(), rel=1e-3)
    assert scores[1].value == pytest.approx(np.mean([kid(held, x) for x in runs]), rel=1e-5)
    distances = [frechet_distance(Moments.of(real), Moments.of(x)) for x in runs]
    assert scores[2].value == pytest.approx(np.mean(distances), rel=1e-5)
    nearest = [torch.cdist(x, real).amin(1).median() for x in (*runs, held)]
    assert scores[3].value == pytest.approx(float((nearest[0] + nearest[1]) / 2 / nearest[2]), rel=1e-4)
    protocols = [s.protocol for s in scores]
    assert [(p.n_ref, p.n_gen) for p in protocols] == [(12, 14), (6, 14), (12, 14), (12, 14), (12, 6)]
    assert [p.reference.split("/")[1] for p in protocols[:3]] == ["train", "holdout", "train"]
    assert len({p.id for p in protocols}) == 5
    assert all((p.conditioning, p.image_size) == ("caption", 16) for p in protocols)


def test_batch_size_does_not_change_scores(tiny_pipeline: Path, data_folder: Path) -> None:
    values = []
    for batch_size in (2, 8):
        report = evaluate(
            str(tiny_pipeline),
            data=str(data_folder),
            num_images=8,
            steps=[1],
            batch_size=batch_size,
            device="cpu",
            progress=False,
        )
        values.append([s["value"] for s in report["rows"][0]["scores"]])
        assert [s["sd"] for s in report["rows"][0]["scores"]] == [None] * 9
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_sampling_json_decides_the_call(folder: Path) -> None:
    def source(sampling: object) -> PipelineSource:
        (folder / "sampling.json").write_text(json.dumps(sampling))
        return PipelineSource(str(folder), CPU)

    fixed = source({"2": {"timesteps": [999, 499], "guidance_scale": 1.0}, "4": {}})
    assert fixed.calls([2], 1, None, 2) == {2: {"timesteps": [999, 499], "guidance_scale": 1.0}}
    assert fixed.arguments(2, 5.0)["guidance_scale"] == 5.0
    with pytest.raises(UserError, match=r"sampling\.json has no 3; choose among 2, 4"):
        fixed.calls([2, 3], 1, None, 2)
    teacher = source({"default": {"guidance_scale": 4.0}, "1": {"num_inference_steps": 2}})
    assert teacher.arguments(7, None) == {"guidance_scale": 4.0, "num_inference_steps": 7}
    assert teacher.arguments(1, 3.0) == {"guidance_scale": 3.0, "num_inference_steps": 2}
    with pytest.raises(UserError, match="takes no 'stride'"):
        source({"default": {"stride": 2}}).arguments(1, None)
    with pytest.raises(UserError, match=r"sampling\.json: .*: export the pipeline again"):
        source([1, 2])
    (folder / "sampling.json").write_text("{")
    with pytest.raises(UserError, match=r"sampling\.json: is not JSON"):
        PipelineSource(str(folder), CPU)


def test_caption_match_asks_each_caption_once(tiny_pipeline: Path, data_folder: Path) -> None:
    score = caption_match(
        str(tiny_pipeline), steps=1, data=str(data_folder), split="train", device="cpu", progress=False
    )
    assert score.protocol.n_gen == 6 and score.protocol.n_ref == 12
    assert score.interval is not None and score.interval[0] <= score.value <= score.interval[1]
    assert score.value * 6 == pytest.approx(round(score.value * 6))


def test_folder_of_real_pictures_scores_as_the_real_pictures(data_folder: Path, tmp_path: Path) -> None:
    for path in (data_folder / "train").glob("*.png"):
        shutil.copy(path, tmp_path / path.name)
    arguments = {
        "data": str(data_folder),
        "num_images": 12,
        "device": "cpu",
        "progress": False,
        "batch_size": 5,
    }
    report = evaluate(str(tmp_path), steps=[], **arguments)
    (row,) = report["rows"]
    kid_, holdout, distance, precision, recall, _, coverage, ratio = (s["value"] for s in row["scores"])
    assert distance < 1e-6 and ratio < 1e-6 and kid_ < holdout
    assert (precision, recall, coverage) == (1, 1, 1)
    assert (
        report["rows"][0]["steps"] is report["rows"][0]["nfe"] is None
        and report["rows"][0]["seconds_per_image"] is None
    )
    assert report["rows"][0]["scores"][0]["protocol"]["conditioning"] == "none"
    for name, value in (("steps", [1]), ("seeds", 2), ("guidance_scale", 2.0)):
        with pytest.raises(UserError, match=f"{name}: has no effect"):
            evaluate(str(tmp_path), **({"steps": []} | {name: value} | arguments))
    with pytest.raises(UserError, match=r"13 wanted, .* holds 12"):
        evaluate(str(tmp_path), steps=[], **(arguments | {"num_images": 13}))
    (tmp_path / "90.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"90\.png: cannot be read as an image"):
        evaluate(str(tmp_path), steps=[], **(arguments | {"num_images": 13}))


def test_a_split_may_be_left_out_but_not_missed(data_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder / "train", tmp_path / "flat")
    arguments = {"data": str(tmp_path / "flat"), "num_images": 12, "device": "cpu", "progress": False}
    report = evaluate(str(data_folder / "train"), steps=[], holdout=None, **arguments)
    metrics = [s["protocol"]["metric"] for s in report["rows"][0]["scores"]]
    assert metrics == ["KID", "FD", "precision", "recall", "density", "coverage"]
    with pytest.raises(UserError, match="holdout"):
        evaluate(str(data_folder / "train"), steps=[], **arguments)


def test_real_floor_is_kid_and_distance_between_real_pictures(
    data_folder: Path, extractor: EfficientNetLite0
) -> None:
    floor = real_floor(image_size=16, data=str(data_folder), device="cpu")
    train, unseen = (extract(extractor, reference(str(data_folder), s, 16)[0]) for s in ("train", "holdout"))
    a, b = Moments.of(train[:6]), Moments.of(train[6:])
    expected = [
        kid(train, unseen),
        frechet_distance(Moments.of(train), Moments.of(unseen)),
        kid(train[:6], train[6:]),
        frechet_distance(a, b),
    ]
    assert [s.value for s in floor] == pytest.approx(expected, rel=1e-5)
    assert [(s.protocol.n_ref, s.protocol.n_gen) for s in floor] == [(12, 6), (12, 6), (6, 6), (6, 6)]


def test_reference_rows_are_a_fixed_fair_order() -> None:
    images, captions = reference("emoji", "holdout", 32)
    again, _ = reference("emoji", "holdout", 32)
    assert images.shape == (456, 3, 32, 32) and images.dtype == torch.uint8 and torch.equal(images, again)
    assert set(Counter(captions).values()) <= {2, 4}
    pairs = 228 - len(set(captions[:228]))
    assert 40 < pairs < 75  # of 456 rows half are drawn: 57 captions are expected with both of their pictures


def test_unconditional_pipelines_have_no_captions(tmp_path: Path, data_folder: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    arguments = {"data": str(data_folder), "device": "cpu", "progress": False}
    report = evaluate(str(tmp_path / "ddpm"), num_images=4, steps=[2], **arguments)
    scores = [Score.from_json(s) for s in report["rows"][0]["scores"]]
    assert [s.protocol.metric for s in scores] == ["KID", "KID", "FD", "NN ratio"]
    assert {s.protocol.conditioning for s in scores} == {"none"} and scores[0].protocol.prompts_sha256 == ""
    with pytest.raises(UserError, match="takes no prompts"):
        caption_match(str(tmp_path / "ddpm"), steps=2, **arguments)
    with pytest.raises(UserError, match="takes no 'guidance_scale'"):
        evaluate(str(tmp_path / "ddpm"), num_images=4, steps=[2], guidance_scale=2.0, **arguments)


def test_pipelines_that_cannot_be_scored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PipelineSource(str(folder), CPU)
    source.pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinity"):
        source.pictures(range(2), Inputs.of_captions(["cat"]), 0, {"num_inference_steps": 1})
    with pytest.raises(UserError, match="at least one number of steps"):
        source.calls([], 1, None, 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("empty", "holds neither a pipeline"),
        ("./nowhere", "no such folder"),
        ("nobody/nothing", "check the spelling and the network"),
        (str(tmp_path), "this is a run folder; give .*pipeline"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(name, CPU)
        assert "\n" not in str(caught.value)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UserError, match="cannot be loaded as a pipeline"):
        open_source(str(folder), CPU)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": [None, None]}))
    with pytest.raises(UserError, match="scheduler"):
        open_source(str(folder), CPU)


def test_black_squares_of_a_safety_checker_are_not_scored(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    side = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**side, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={**side, "vocab_size": 8}, vision_config=vision, projection_dim=8)
    )
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipe.save_pretrained(folder)
    assert DiffusionPipeline.from_pretrained(folder).safety_checker is not None
    assert PipelineSource(str(folder), CPU).pipe.safety_checker is None


def test_wrong_numbers_stop_before_any_work(tmp_path: Path) -> None:
    for arguments, message in (
        ({"num_images": 1}, "num_images: 1"),
        ({"num_images": 4, "seeds": 0}, "seeds: 0"),
        ({"num_images": 4, "batch_size": 0}, "batch_size: 0"),
        ({"num_images": 4, "device": "abacus"}, "device: abacus"),
        ({"num_images": 4, "output": tmp_path}, "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("./nowhere", steps=[1], **arguments)


def test_what_was_made_is_not_made_again(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": str(data_folder), "num_images": 7, "steps": [1], "device": "cpu", "progress": False}
    calls = counted(monkeypatch)
    first = evaluate(str(folder), batch_size=3, **arguments)
    assert [len(rows) for rows in calls] == [3, 3, 3, 1]  # one batch of warm-up
    calls.clear()
    assert evaluate(str(folder), batch_size=3, **arguments)["rows"] == first["rows"]
    assert calls == []
    again = evaluate(str(folder), batch_size=3, fresh=True, **arguments)
    assert len(calls) == 4 and again["rows"][0]["scores"] == first["rows"][0]["scores"]
    calls.clear()
    evaluate(str(folder), batch_size=4, **arguments)
    assert len(calls) == 3
    for change in (
        lambda: (folder / "sampling.json").write_text(
            '{"1": {"num_inference_steps": 1, "guidance_scale": 1.0}}'
        ),
        lambda: shrink(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    ):
        change()
        calls.clear()
        other = evaluate(str(folder), batch_size=3, **arguments)
        assert len(calls) == 4 and other["rows"][0]["scores"] != first["rows"][0]["scores"]


def test_damaged_features_are_made_again(
    folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of generated pictures, of real ones, and the numbers of real ones alone."""
    how = {"data": str(data_folder), "num_images": 6, "steps": [1], "device": "cpu", "progress": False}
    first = evaluate(str(folder), batch_size=3, **how)
    calls, files = counted(monkeypatch), sorted((tmp_path / "cache").glob("features-*.rows"))
    sound = [path.read_bytes() for path in files]
    assert len(files) == 6  # generated; train and hold-out; KID within both; distance between them
    for path, content in zip(files, sound, strict=True):
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 0x40
        path.write_bytes(damaged)
    caplog.clear()
    again = evaluate(str(folder), batch_size=3, **how)
    assert [len(rows) for rows in calls] == [3, 3, 3]  # one batch of warm-up
    assert again["rows"][0]["scores"] == first["rows"][0]["scores"]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 6 and all(line.endswith("are damaged: making them anew") for line in lines)
    assert {line.partition(": rows 0 to ")[0] for line in lines} == {str(path) for path in files}


def test_five_full_batches_need_no_warm_up(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": str(data_folder), "steps": [1], "device": "cpu", "progress": False, "batch_size": 2}
    calls = counted(monkeypatch)
    evaluate(str(folder), num_images=11, **arguments)
    assert [len(rows) for rows in calls] == [2, 2, 2, 2, 2, 1]
    calls.clear()
    evaluate(str(folder), num_images=9, **arguments)
    assert [len(rows) for rows in calls] == [2, 2, 2, 2, 2, 1]


def shrink(path: Path) -> None:
    save_file({k: v * 0.9 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def test_an_interrupted_evaluation_goes_on(
    folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": str(data_folder), "num_images": 8, "steps": [1], "device": "cpu", "progress": False}
    calls, plain = counted(monkeypatch), PipelineSource.pictures

    def breaking(self: PipelineSource, rows: range, *rest: object) -> object:
        if rows.start == 6:
            raise KeyboardInterrupt
        return plain(self, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PipelineSource, "pictures", breaking)
        evaluate(str(folder), batch_size=2, output=tmp_path / "report.json", **arguments)
    assert not (tmp_path / "report.json").exists()
    calls.clear()
    resumed = evaluate(str(folder), batch_size=2, output=tmp_path / "report.json", **arguments)
    assert [rows.start for rows in calls] == [0, 6]  # warm-up, and the batch that was missing
    whole = evaluate(str(folder), batch_size=2, fresh=True, **arguments)
    assert resumed["rows"][0]["scores"] == whole["rows"][0]["scores"]


def test_two_processes_score_as_one(tiny_pipeline: Path, data_folder: Path, tmp_path: Path) -> None:
    command = [
        "evaluate",
        str(tiny_pipeline),
        "--data",
        str(data_folder),
        "--num_images",
        "9",
        "--steps",
        "1",
    ]
    command += ["--batch_size", "2", "--device", "cpu", "--fresh", "--output"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "fewstep.distill.cli",
    ]
    child = subprocess.run(
        [sys.executable, *launch, *command, str(tmp_path / "two.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.count("\n| pipeline |") == 1
    one, two = (read_report(tmp_path / f"{n}.json")["rows"][0]["scores"] for n in ("one", "two"))
    assert [s["value"] for s in two] == pytest.approx([s["value"] for s in one], rel=1e-4)
    assert [s["protocol_id"] for s in two] == [s["protocol_id"] for s in one]


def test_data_without_captions_has_none_to_score_by(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "holdout"):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for path in (data_folder / split).glob("*.png"):
            shutil.copy(path, tmp_path / "plain" / split)
    arguments = {"data": str(tmp_path / "plain"), "num_images": 6, "steps": [1], "device": "cpu"}
    report = evaluate(str(tiny_pipeline), progress=False, **arguments)
    scores = [Score.from_json(s) for s in report["rows"][0]["scores"]]
    assert {s.protocol.conditioning for s in scores} == {"none"} and {
        s.protocol.prompts_sha256 for s in scores
    } == {""}
    assert "caption match" not in [s.name for s in scores]
    with pytest.raises(UserError, match="has no captions to score pictures with"):
        evaluate(str(tiny_pipeline), clip="lite0-minilm", **arguments)


def test_the_reference_is_not_its_own_holdout(tiny_pipeline: Path, data_folder: Path) -> None:
    with pytest.raises(UserError, match="holdout: train is the reference itself"):
        evaluate(str(tiny_pipeline), data=str(data_folder), holdout="train", num_images=4, steps=[1])


def test_pipelines_that_want_a_picture_are_refused_in_one_line(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"})
    )
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline refuses the call"):
        evaluate(str(folder), num_images=4, steps=[2], holdout=None)


def test_peak_memory_is_that_of_the_pictures() -> None:
    with PeakMemory(CPU) as large:
        torch.ones(80 * 2**20, dtype=torch.uint8).sum()
    with PeakMemory(CPU) as small:
        torch.ones(2**20, dtype=torch.uint8).sum()
    assert large.bytes is not None and small.bytes is not None
    assert large.bytes - small.bytes > 60 * 2**20


def test_picture_formats_are_part_of_the_protocol(data_folder: Path, tmp_path: Path) -> None:
    found = []
    for suffix in ("png", "jpg"):
        folder = tmp_path / suffix
        folder.mkdir()
        for path in (data_folder / "train").glob("*.png"):
            Image.open(path).save(folder / f"{path.stem}.{suffix}")
        report = evaluate(
            str(folder), data=str(data_folder), num_images=6, steps=[], device="cpu", progress=False
        )
        found.append(Score.from_json(report["rows"][0]["scores"][0]).protocol)
    assert [p.input for p in found] == ["uint8, image files (png)", "uint8, image files (jpg)"]
    assert found[0].id != found[1].id


def test_a_loaded_pipeline_is_known_by_its_weights(folder: Path) -> None:
    pipes = [DiffusionPipeline.from_pretrained(folder) for _ in range(3)]
    assert hash_parts(pipes[0]) == hash_parts(pipes[1])
    next(iter(pipes[1].unet.parameters())).data.flatten()[0] += 1
    pipes[2].scheduler.register_to_config(beta_end=0.5)
    assert len({hash_parts(pipe) for pipe in pipes}) == 3
