"""The benchmark of restorers at a tiny size: its rows, its numbers by hand, its command."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.generator import fresh_from
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.degradation import Degradation, enlarged
from fewstep.distill.methods.restoration.restorer import Restorer
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import make_extractor
from fewstep.distill.metrics.kid import kid
from fewstep.distill.metrics.reference import reference
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.reports.restoration import benchmark
from fewstep.distill.scorers.vision import Vision
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training.grid import to_uint8
from fewstep.distill.training.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
DEGRADATION = {"kernel_size": 3, "blur": [0.1, 1.0], "downsample": [2.0, 4.0]}
METHOD = {
    "name": "interlcm", "degradation": DEGRADATION, "num_steps": 3, "visual": None, "perceptual": "efflite0",
    "gan_weight": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(lcm_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run that has been made."""
    run = tmp_path_factory.mktemp("restoration") / "tiny"
    tree = {
        "output_dir": str(run), "teacher": {"path": str(lcm_pipeline)}, "method": METHOD, "train_batch_size": 2,
        "data": {"name": "emoji-noto", "split": "score"}, "max_train_steps": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        Runner(load_config(tree)).train()
    return tree


def report_of(config: dict[str, Any], restorers: list[str], seeds: int = 2) -> tuple[dict[str, Any], Any]:
    return benchmark(
        load_config(config), restorers, split="holdout", num_images=6, seeds=seeds, batch_size=4,
        extractor="efflite0-128", distance="efflite0", device=torch.device("cpu"),
    )  # fmt: skip


def test_rows_and_their_numbers(config: dict[str, Any], lcm_pipeline: Path) -> None:
    report, pictures = report_of(config, [config["output_dir"]])
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "degraded", "bicubic", "clean, autoencoder", "img2img from t = 679", "img2img from t = 339",
        "tiny", "tiny, wavelet",
    ]  # fmt: skip
    assert [row["steps"] for row in rows.values()] == [None, None, None, 2, 1, 2, 2]
    assert set(pictures) == {"clean", *rows} and pictures["tiny"].shape == (6, 3, 16, 16)
    clean = reference("emoji-noto", "holdout", 16)[0][:6]
    real = extract(make_extractor("efflite0-128"), reference("emoji-noto", "score", 16)[0])
    settings = Degradation(3, blur=(0.1, 1.0), downsample=(2.0, 4.0))
    one = Restorer(Teacher.load(TeacherSettings(str(lcm_pipeline))), 3)
    found: dict[str, list[tuple[float, ...]]] = {
        k: [] for k in ("degraded", "bicubic", "img2img from t = 679")
    }
    for seed in (0, 1):
        small = settings.small(clean.float() / 255, Draws(seed, 0, range(6)))
        degraded = 2 * enlarged(small, 16, cv2.INTER_LINEAR) - 1
        generators = [torch.Generator().manual_seed(1_000_000 * seed + i) for i in range(6)]
        with torch.no_grad():
            told = one.teacher.condition([""] * 6)
            made = one.teacher.decode(one(one.latents(degraded), told, fresh_from(generators), 1))
        outputs = (degraded, 2 * enlarged(small, 16, cv2.INTER_CUBIC) - 1, made)
        for name, images in zip(found, map(to_uint8, outputs), strict=True):
            errors = (images.double() - clean.double()).square().mean((1, 2, 3))
            psnr = (10 * (255**2 / errors).log10()).mean().item()
            apart = Vision().distance("efflite0")(images.float() / 127.5 - 1, clean.float() / 127.5 - 1)
            features = extract(make_extractor("efflite0-128"), images)
            found[name].append((psnr, apart.mean().item(), kid(real, features)))
    for name, values in found.items():
        for i, metric in enumerate(("psnr", "distance", "kid")):
            mean, sd = rows[name][metric]
            pair = torch.tensor([v[i] for v in values])
            assert mean == pytest.approx(pair.mean().item(), rel=2e-3, abs=1e-4), (name, metric)
            assert sd == pytest.approx(pair.std().item(), rel=0.05, abs=1e-3), (name, metric)
    assert report["protocol"]["degradation"]["downsample"] == (2.0, 4.0)
    assert "6 pictures of 16 px" in report["protocol"]["data"]


def test_the_command(
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location(
        "benchmark_restoration", ROOT / "scripts" / "benchmark_restoration.py"
    )
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path, output = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(json.dumps(config))
    words = [
        str(path),
        "--num_images",
        "3",
        "--seeds",
        "1",
        "--distance",
        "efflite0",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark_restoration.py", *words, "--method.num_steps", "2"])
    assert script.main() == 0
    report = json.loads((output / "restoration.json").read_text())
    assert [row["name"] for row in report["rows"]][3:] == ["img2img from t = 499", "tiny", "tiny, wavelet"]
    assert report["environment"]["torch"] and report["rows"][0]["psnr"][1] is None
    table = (output / "restoration.md").read_text()
    assert "| tiny | 2 |" in table and "| degraded | - |" in table and table in capsys.readouterr().out
    assert (output / "restoration.png").is_file()
    monkeypatch.setattr(sys, "argv", ["benchmark_restoration.py", *words, "--restorer", str(tmp_path)])
    assert script.main() == 2
    assert "holds no restorer" in capsys.readouterr().err


def test_another_method_is_refused() -> None:
    config = load_config(read_yaml(ROOT / "configs" / "emoji" / "nct_canny.yaml"))
    with pytest.raises(UserError, match=r"method.name: nct restores nothing"):
        benchmark(
            config, [], split="holdout", num_images=1, seeds=1, batch_size=1, extractor="efflite0-128",
            distance="efflite0", device=torch.device("cpu"),
        )  # fmt: skip
