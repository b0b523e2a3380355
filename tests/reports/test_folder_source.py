"""A folder of pictures is read alike as what is scored and as the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.distill.cli import main
from fewstep.distill.data.images import PICTURE_SUFFIXES
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.metrics.kid import kid
from fewstep.distill.metrics.protocol import Score
from fewstep.distill.metrics.reference import reference
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.folder_source import FolderSource
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.opening import open_source
from fewstep.distill.reports.report import read_report
from PIL import Image

CPU = torch.device("cpu")
HOW: dict[str, Any] = {"steps": [], "holdout": None, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Brighter from left to right and from top to bottom, with noise: no turn or shift of it is the same."""
    x, y = np.meshgrid(np.linspace(0, 90, width), np.linspace(0, 140, height))
    noise = np.random.default_rng(seed).integers(0, 25, (height, width, 3))
    return Image.fromarray(((x + y)[..., None] + noise).astype(np.uint8))


def pictures_of(source: FolderSource, count: int) -> torch.Tensor:
    return source.pictures(range(count), Inputs(), 0, {})[0]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turned by EXIF in every way, wide and tall, of two sizes, in subfolders, of many endings, with transparency."""
    root = tmp_path_factory.mktemp("odd")
    (root / "sub" / "deeper").mkdir(parents=True)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture(24, 20, turn).save(root / f"turned {turn}.{'png' if turn % 2 else 'jpg'}", exif=exif)
    for i, name in enumerate(
        ("a.tif", "b.gif", "c.webp", "d.bmp", "E.PNG", "sub/f.tiff", "sub/deeper/g.jpeg")
    ):
        picture(20, 33, 10 + i).save(root / name)
    picture(40, 41, 20).save(root / "sub" / "large.png")
    clear = picture(21, 20, 21).convert("RGBA")
    clear.putalpha(128)
    clear.save(root / "sub" / "clear.png")
    if ".avif" in Image.registered_extensions():
        picture(20, 20, 22).save(root / "h.avif")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no picture")
    return root


def test_a_folder_against_itself(
    odd: Path, extractor: EfficientNetLite0, caplog: pytest.LogCaptureFixture
) -> None:
    count = len(load_data(str(odd), resolution=1))
    files = [p for p in odd.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.name[0] != "."]
    assert len(files) - 1 <= count <= len(files) and count >= 17
    real, _ = reference(str(odd), "train", 20)
    source = open_source(str(odd), CPU)
    assert isinstance(source, FolderSource) and torch.equal(pictures_of(source, count), real)
    caplog.clear()
    (row,) = evaluate(str(odd), data=str(odd), num_images=count, **HOW)["rows"]
    scores = [Score.from_json(s) for s in row["scores"]]
    values = {s.protocol.metric: s.value for s in scores}
    features = extract(extractor, real)
    assert values["FD"] < 1e-6 and values["KID"] == pytest.approx(kid(features, features), abs=1e-7)
    assert (values["precision"], values["recall"], values["coverage"]) == (1, 1, 1)
    for protocol in (s.protocol for s in scores):
        assert protocol.reference.startswith(f"{odd.name}/train, centre squares")
        assert protocol.input.startswith("uint8, image files (")
        assert protocol.input.endswith("); centre squares; resized to 20 px, bicubic antialiased")
        assert protocol.image_size == 20 and protocol.n_ref == protocol.n_gen == count
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"{odd}: squares of 20 to 40 pixels: all are resized to 20, the side of ")


def test_turned_pictures_stand_as_viewers_show_them(tmp_path: Path) -> None:
    upright = picture(16, 16, 0)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for turn, undo in back.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        upright.transpose(undo).save(tmp_path / f"{turn}.png", exif=exif)
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert all(torch.equal(x, expected) for x in pictures_of(FolderSource(tmp_path), 3))


def test_squares_of_one_size_are_taken_byte_for_byte(tmp_path: Path) -> None:
    """In a fixed random order of their names, of which the first are those of the reference."""
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        picture(16, 16, i).save(tmp_path / name)
    source = FolderSource(tmp_path)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [np.array(Image.open(tmp_path / sorted(names)[i])) for i in order]
    assert torch.equal(pictures_of(source, 12), torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
    assert torch.equal(pictures_of(source, 5), reference(str(tmp_path), "train", 16)[0][:5])
    assert (source.quantisation, source.touched) == ("uint8, image files (png)", None)
    (row,) = evaluate(str(tmp_path), data=str(tmp_path), num_images=5, **HOW)["rows"]
    protocol = row["scores"][0]["protocol"]
    assert protocol["seed_rule"] == "files of a folder in a fixed random order (seed 0)"
    assert protocol["reference"] == f"{tmp_path.name}/train"


def test_pictures_of_a_control_belong_to_their_names(tmp_path: Path) -> None:
    """Picture i of `fewstep sample` has condition i, in whatever order it is scored."""
    for split in ("real", "made"):
        (tmp_path / split).mkdir()
    for i in range(9):
        picture(16, 16, i).save(tmp_path / "real" / f"{i}.png")
    control = {"data": str(tmp_path / "real"), "control": "canny"}
    real, _ = reference(control["data"], "train", 16)
    for i, pixels in enumerate(real):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "made" / f"{i}.png")
    out = tmp_path / "report.json"
    for count in ("9", "4"):
        call = ["evaluate", str(tmp_path / "made"), "--data", control["data"], "--control", "canny"]
        call += ["--num_images", count, "--holdout", "none", "--device", "cpu", "--output", str(out)]
        assert main(call) == 0
        score = Score.from_json(read_report(out)["rows"][0]["scores"][-1])
        assert (score.name, score.value) == ("condition error", 0)
        assert score.protocol.n_ref == int(count)


def test_squeezed_where_the_reference_is(odd: Path) -> None:
    source = open_source(str(odd), CPU, center_crop=False)
    real, _ = reference(str(odd), "train", 20, {"center_crop": False})
    assert isinstance(source, FolderSource) and torch.equal(pictures_of(source, len(real)), real)
    assert "; squeezed to squares; resized" in source.quantisation
    count = len(real)
    (row,) = evaluate(str(odd), data=str(odd), num_images=count, data_options={"center_crop": False}, **HOW)[
        "rows"
    ]
    assert row["scores"][1]["value"] < 1e-6
    assert row["scores"][1]["protocol"]["reference"] == f"{odd.name}/train, squeezed to squares"


def test_published_protocols_take_files_as_they_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, change in (("turned", exif), ("wide", None), ("small", None)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(3):
            picture(32, 32, i).save(folder / f"{i}.png")
        size = {"turned": (32, 32), "wide": (33, 32), "small": (31, 31)}[name]
        picture(*size, 9).save(folder / "9.png", **({"exif": change} if change else {}))
        with pytest.raises(UserError, match=r"protocol cifar10-50k takes files as they are") as caught:
            evaluate(str(folder), protocol="cifar10-50k", num_images=4, steps=[], progress=False)
        blamed = "0.png: 32x32" if name == "small" else "9.png: "
        assert blamed in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_splits_is_its_training_pictures(data_folder: Path, tmp_path: Path) -> None:
    source = FolderSource(data_folder)
    assert len(source.order) == 12 and source.describe()["pipeline"].endswith("/train")
    assert source.identity() == FolderSource(data_folder / "train").identity()
    (tmp_path / "test").mkdir()
    picture(8, 8, 0).save(tmp_path / "test" / "a.png")
    with pytest.raises(UserError, match=r"holds the splits test; give .*/test"):
        FolderSource(tmp_path)


def test_a_file_edited_in_place_is_another_source(tmp_path: Path) -> None:
    for i in range(3):
        picture(16, 16, i).save(tmp_path / f"{i}.bmp")
    before = FolderSource(tmp_path).identity()
    path = tmp_path / "1.bmp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert FolderSource(tmp_path).identity() != before
