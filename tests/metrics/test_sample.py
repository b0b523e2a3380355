"""A folder of samples: the pictures that `evaluate` would see, readable as data."""

from pathlib import Path

import pytest
import torch
from fewstep.distill.cli import main
from fewstep.distill.data import load_data
from fewstep.distill.metrics.evaluate import open_source
from fewstep.distill.metrics.inputs import Inputs
from fewstep.distill.metrics.reference import captions_of


def test_samples_are_a_data_set(
    tiny_pipeline: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    call = ["sample", str(tiny_pipeline), "--data", str(data_folder), "--steps", "1", "--num_images", "14"]
    call += ["--batch_size", "5", "--guidance_scale", "1.0", "--output", str(out)]
    assert main(call) == 0
    captions = captions_of(str(data_folder), "train")
    captions = [captions[i % 12] for i in range(14)]
    source = open_source(str(tiny_pipeline), torch.device("cpu"))
    arguments = source.calls([1], 1, 1.0, 14)[1]
    expected, _ = source.pictures(range(14), Inputs.of_captions(captions), 1000, arguments)
    made = load_data(str(out), resolution=16)
    assert made.captions == captions and torch.equal(made.images(), expected)
    capsys.readouterr()
    assert main(call) == 2
    assert f"output: {out} is not empty; name a new folder" in capsys.readouterr().err
