"""A LoRA in the key layout of kohya and ComfyUI: diffusers reads it back, and draws the same pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file


def drawn(folder: Path, lora: Path | None, name: str | None = None) -> torch.Tensor:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    if lora is not None:
        pipe.load_lora_weights(lora, weight_name=name)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    return pipe("red cat", generator=generator, **call).images


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_both_layouts_draw_the_same(
    name: str,
    tiny_pipeline: Path,
    tiny_families: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All layers of the default targets, rank and alpha unequal."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = tiny_pipeline if name == "sd" else tiny_families(name)
    tree = {
        "output_dir": str(tmp_path / "own"),
        "teacher": {"path": str(folder)},
        "student": {"kind": "lora", "rank": 4, "lora_alpha": 12, "export_fused": False},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 2e-2,
    }
    runner = Runner(load_config(tree))
    runner.train()
    assert runner.finished()
    weights = load_file(tmp_path / "own" / "lora" / "pytorch_lora_weights.safetensors")
    kohya = load_file(tmp_path / "own" / "kohya" / "own.safetensors")
    assert len(kohya) == 3 * len(weights) / 2 and all(k.startswith("lora_unet_") for k in kohya)
    assert {k.partition(".")[2] for k in kohya} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(v == 4 for k, v in kohya.items() if k.endswith("alpha"))  # its scale is in the weights
    plain, ours = drawn(folder, None), drawn(folder, tmp_path / "own" / "lora")
    other = drawn(folder, tmp_path / "own" / "kohya", "own.safetensors")
    assert (ours - plain).abs().max() > 1e-3
    assert torch.allclose(other, ours, atol=1e-5)


def test_a_transformer_has_one_layout(
    tiny_families: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI takes diffusers' keys of SD3 and Flux."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tree = {
        "output_dir": str(tmp_path / "run"),
        "teacher": {"path": str(tiny_families("sd3"))},
        "student": {"kind": "lora", "rank": 2, "export_fused": False},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "dmd2", "gan_weight": 0.0},
        "resolution": 16,
        "train_batch_size": 2,
        "max_train_steps": 1,
    }
    Runner(load_config(tree)).train()
    assert (tmp_path / "run" / "lora").is_dir() and not (tmp_path / "run" / "kohya").exists()
