"""`evaluate --protocol` and `--clip` end to end: a small named protocol, prepared from local files."""

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fewstep.distill.cli import main
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.inception import InceptionFID
from fewstep.distill.metrics.protocol import Score, hash_prompts
from fewstep.distill.metrics.reference import captions_of
from fewstep.distill.protocols import prepare
from fewstep.distill.protocols.archives import Crop
from fewstep.distill.protocols.prepare import prepare_data
from fewstep.distill.protocols.standards import Stated, truncate_pixels
from fewstep.distill.protocols.table import COCO2014, STANDARDS
from fewstep.distill.reports import judges
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.pipeline_source import PipelineSource
from fewstep.distill.reports.report import read_report
from fewstep.distill.scorers.by_name import make_scorer
from fewstep.distill.scorers.image_text import COSINE, pair_cosines
from PIL import Image
from torch import Tensor

from ..tiny_classes import consistency_folder

CAPTIONS = ["red cat", "dog", "cat", "red dog", "cat dog", "red"]
CROP = Crop(square=True, side=12)


@pytest.fixture
def reference(
    tmp_path: Path, weights: Path, picture_sets: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """The protocol "small": 20 pictures, 6 captions, random Inception weights, all given as files."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    pictures = picture_sets[0][:20]
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for i, picture in enumerate(pictures):
            path = tmp_path / "one.png"
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
            archive.write(path, f"val2014/{i:02d}.png")
    (tmp_path / "captions.txt").write_text("\n".join([*CAPTIONS, "never used"]) + "\n")
    known = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "WEIGHTS", replace(prepare.WEIGHTS, sha256=known))
    monkeypatch.setattr(
        prepare, "make_extractor", lambda name: InceptionFID(weights, layer=64, resize=name.split("-")[1])
    )
    small = replace(
        COCO2014,
        name="small",
        num_images=Stated(6, "here"),
        image_size=Stated(16, "here"),
        crop=Stated(CROP, "here"),
        extractor=Stated("inception-clean-64", "here"),
        members=Stated("val2014/*.png", "here"),
        n_ref=Stated(20, "here"),
        prompts=Stated(replace(COCO2014.prompts.value, sha256=None), "here"),
    )
    monkeypatch.setitem(STANDARDS, "small", small)
    given = {"pictures": tmp_path / "real.zip", "prompts": tmp_path / "captions.txt", "weights": weights}
    prepare_data("small", progress=False, **given)
    return pictures


def score(pipeline: Path, output: Path, *flags: str) -> int:
    command = [
        "evaluate",
        str(pipeline),
        "--steps",
        "1",
        "--num_images",
        "6",
        "--device",
        "cpu",
        "--batch_size",
        "4",
    ]
    return main([*command, "--guidance_scale", "1.0", "--output", str(output), *flags])


def test_the_number_is_made_by_the_protocols_recipe(
    reference: Tensor, tiny_pipeline: Path, weights: Path, tmp_path: Path
) -> None:
    assert score(tiny_pipeline, tmp_path / "report.json", "--protocol", "small", "--seeds", "2") == 0
    report = read_report(tmp_path / "report.json")
    (found,) = (Score.from_json(s) for s in report["rows"][0]["scores"])

    network = InceptionFID(weights, layer=64, resize="clean")
    source = PipelineSource(str(tiny_pipeline), torch.device("cpu"))
    raw = []
    source.quantise_by(lambda x: raw.append(x) or (x * 255).byte(), "kept")
    real = Moments.of(extract(network, CROP(reference)))
    values = []
    for seed in (0, 1):
        source.pictures(
            range(6), Inputs.of_captions(CAPTIONS), seed, {"num_inference_steps": 1, "guidance_scale": 1.0}
        )
        pictures = truncate_pixels(raw[-1] * 2 - 1)
        values.append(frechet_distance(Moments.of(extract(network, CROP(pictures))), real))
    assert found.value == pytest.approx(sum(values) / 2, rel=1e-4)
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    assert found.name == f"FD-{network.name}" and report["verified"] == "protocol not verified here"
    assert (found.protocol.reference, found.protocol.n_ref, found.protocol.n_gen) == ("small", 20, 6)
    assert "truncate" in found.protocol.input and str(CROP) in found.protocol.input
    assert report["standard"]["standard"] == "small" and report["standard"]["crop"]["source"] == "here"


def test_other_counts_sizes_and_missing_files_are_refused(
    reference: Tensor, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "report.json"
    for change, flags, message in (
        ({}, ["--extractor", "inception"], "extractor: has no effect beside --protocol small; leave it out"),
        ({"prompts": None, "prompts_rule": None}, [], "small has no captions for the text-to-image pipeline"),
        ({}, ["--num_images", "10"], "num_images: 10, but protocol small has 6"),
        ({"image_size": Stated(32, "here")}, [], "image_size: 16, but protocol small has 32"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(STANDARDS, "small", replace(STANDARDS["small"], **change))
            assert score(tiny_pipeline, output, "--protocol", "small", *flags) == 2
        assert message in capsys.readouterr().err
    assert score(tiny_pipeline, output, "--protocol", "coco") == 2
    assert "protocol: no 'coco'; available: cifar10-50k" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache" / "protocols" / "small")
    assert score(tiny_pipeline, output, "--protocol", "small") == 2
    assert "run `fewstep prepare-data small`" in capsys.readouterr().err
    assert not output.exists()


def test_a_crop_is_not_taken_from_the_cache_of_another(
    reference: Tensor, picture_sets: tuple[Tensor, Tensor], weights: Path, tmp_path: Path,
    data_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "files"
    folder.mkdir()
    for i, picture in enumerate(picture_sets[1][:6, :, :16, :16]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    network = InceptionFID(weights, layer=64, resize="clean")
    monkeypatch.setattr(judges, "make_extractor", lambda name: network)
    values = []
    for flags in (["--data", str(data_folder), "--extractor", "inception-clean-64"], ["--protocol", "small"]):
        output = tmp_path / f"{len(values)}.json"
        command = ["evaluate", str(folder), "--num_images", "6", "--device", "cpu", "--output", str(output)]
        assert main([*command, *flags]) == 0
        values.append(Score.from_json(read_report(output)["rows"][0]["scores"][-1]))
    pictures = picture_sets[1][:6, :, :16, :16]
    real = Moments.of(extract(network, CROP(reference)))
    expected = frechet_distance(Moments.of(extract(network, CROP(pictures))), real)
    assert values[1].value == pytest.approx(expected, rel=1e-4)
    assert values[1].protocol.input == f"uint8, image files (png); crop: {CROP}"


def test_ten_pictures_do_not_pass_for_fifty_thousand(
    reference: Tensor, picture_sets: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ten"
    folder.mkdir()
    for i, picture in enumerate(picture_sets[1][:10, :, :32, :32]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    for count, message in (("50000", "50000 wanted"), ("10", "10, but protocol cifar10-50k has 50000")):
        command = [
            "evaluate",
            str(folder),
            "--num_images",
            count,
            "--protocol",
            "cifar10-50k",
            "--device",
            "cpu",
        ]
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_labels_of_a_protocol_are_uniform_and_fixed(
    reference: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = consistency_folder(tmp_path / "classes", classes=10)
    command = ["evaluate", str(folder), "--steps", "1", "--num_images", "6", "--device", "cpu"]
    command += ["--protocol", "small", "--output", str(tmp_path / "report.json")]
    assert main(command) == 2
    assert "small has no classes for the class-conditional pipeline" in capsys.readouterr().err
    known = replace(STANDARDS["small"], num_classes=Stated(10, "here"))
    monkeypatch.setitem(STANDARDS, "small", known)
    assert main(command) == 0
    (found,) = (Score.from_json(s) for s in read_report(tmp_path / "report.json")["rows"][0]["scores"])
    judge = judges.StandardJudge("small", torch.device("cpu"), 4, False)
    labels = judge.inputs("class", 10_000).values
    assert (found.protocol.conditioning, found.protocol.prompts_sha256) == ("class", hash_prompts(labels[:6]))
    counts = torch.bincount(torch.tensor(labels), minlength=10)
    assert (
        (counts - 1000).double().square().sum() / 1000
    ) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert STANDARDS["cifar10-50k"].num_classes.value == 10 and STANDARDS["coco2014-30k"].num_classes is None


def test_image_text_score_is_the_mean_cosine_with_the_captions(
    tiny_pipeline: Path, tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    for name in ("one", "again"):
        flags = ("--data", str(data_folder), "--clip", "lite0-minilm")
        assert score(tiny_pipeline, tmp_path / f"{name}.json", *flags) == 0
    one, again = (json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in ("one", "again"))
    assert one == again
    found = Score.from_json(one[0]["scores"][-1])
    scorer, measure = make_scorer("lite0-minilm")
    source = PipelineSource(str(tiny_pipeline), torch.device("cpu"))
    prompts = captions_of(str(data_folder), "train")[:6]
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    images, _ = source.pictures(range(6), Inputs.of_captions(prompts), 0, call)
    assert measure == COSINE and found.name == "image-text cosine lite0-minilm"
    assert found.value == pytest.approx(float(pair_cosines(scorer, images, prompts).mean()), abs=1e-4)
    assert found.protocol.n_gen == 6 and found.protocol.extractor == "lite0-minilm"


def test_clip_needs_captions(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(data_folder / "train"), "--data", str(data_folder), "--num_images", "4"]
    assert main([*command, "--clip", "lite0-minilm", "--device", "cpu"]) == 2
    assert "clip: " in capsys.readouterr().err
