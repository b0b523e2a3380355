"""Fixtures of tests that score pictures; the rooms' conftest.py take them from here."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fewstep.distill.cli import main
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.reports import compare as comparing
from fewstep.distill.scorers.lite_minilm import LiteMiniLM
from PIL import Image

CAPTIONS = ["cat", "dog", "red", "red cat", "red dog", "cat dog"]


def here(command: list[str]) -> int:
    """`run_child` of the same command line, without the imports of a new process."""
    assert command[:3] == [sys.executable, "-m", "fewstep.distill.cli"]
    with contextlib.redirect_stdout(io.StringIO()):
        return main(command[3:])


@pytest.fixture(scope="module")
def scored_here() -> Iterator[None]:
    """`compare` scores its models in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "run_child", here)
        yield


@pytest.fixture(scope="session")
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="session")
def lite0() -> LiteMiniLM:
    return LiteMiniLM("lite0-minilm")


@pytest.fixture(scope="session")
def lite2() -> LiteMiniLM:
    return LiteMiniLM("lite2-minilm")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 px: two pictures a caption in train, one in holdout, each its caption's colour with noise."""
    root = tmp_path_factory.mktemp("data")
    draw = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (len(CAPTIONS), 1, 1, 3), generator=draw)
    for split, copies in (("train", 2), ("holdout", 1)):
        (root / split).mkdir()
        lines = []
        for i, caption in enumerate(CAPTIONS * copies):
            noise = torch.randint(-40, 41, (16, 16, 3), generator=draw)
            pixels = (colours[i % len(CAPTIONS)] + noise).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(root / split / f"{i:02d}.png")
            lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": caption}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root
