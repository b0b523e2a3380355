"""Every MeanFlow configuration passes a dry run, at the published sizes and without a network."""

from pathlib import Path

import pytest
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.planning.dry_run import describe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def dry_run(name: str) -> str:
    return describe(load_config(read_yaml(CONFIGS / f"{name}.yaml")))


@pytest.mark.parametrize(
    ("name", "vae", "parameters"),
    [
        ("meanflow_b", "mse", 131_091_472),
        pytest.param("meanflow_l", "mse", 459_137_040, marks=pytest.mark.slow),
        pytest.param("meanflow_xl", "mse", 676_440_592, marks=pytest.mark.slow),
        pytest.param("alpha_flow_xl", "ema", 676_440_592, marks=pytest.mark.slow),
    ],
)
def test_imagenet_recipes_have_the_papers_size_and_fetch_nothing(
    name: str, vae: str, parameters: int
) -> None:
    text = dry_run(f"imagenet256/{name}")
    assert f"{parameters:,}\n" in text
    assert f"stabilityai/sd-vae-ft-{vae}  about 0.312 GiB" in text
    assert "activations, estimate" in text and "not estimated" not in text


@pytest.mark.parametrize(
    "name", ["cifar10/meanflow", "emoji/meanflow", "emoji/meanflow_distill", "emoji/meanflow_dit"]
)
def test_other_recipes_pass(name: str) -> None:
    text = dry_run(name)
    assert "activations, estimate" in text and "not estimated" not in text
