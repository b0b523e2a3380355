"""rCM and DMD2 on SDXL, SD3, Flux and Wan: the stock pipeline of a run's folder draws what our sampler draws."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.training.runner import Runner

Families = Callable[[str], Path]
PROMPTS = ["red cat", "dog"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def trained(teacher: Path, run: Path, method: dict[str, Any], student: dict[str, Any]) -> Runner:
    runner = Runner(
        load_config(
            {
                "output_dir": str(run),
                "teacher": {"path": str(teacher)},
                "student": student,
                "data": {"name": "emoji-noto", "split": "score"},
                "resolution": 16,
                "method": method,
                "train_batch_size": 2,
                "max_train_steps": 3,
                "learning_rate": 1e-3,
                "max_grad_norm": None,
                "validation_steps": 3,
            }
        )
    )
    runner.train()
    return runner


@pytest.mark.parametrize(
    ("family", "method", "student"),
    [
        ("sdxl", {"name": "rcm", "guidance_scale": 2.0, "student_update_freq": 2}, {}),
        ("sd3", {"name": "rcm", "guidance_scale": 2.0, "student_update_freq": 2}, {}),
        ("flux", {"name": "rcm", "student_update_freq": 2}, {}),
        (
            "flux",
            {"name": "dmd2", "gan_weight": 0.0, "student_update_freq": 2},
            {"kind": "lora", "rank": 4, "export_fused": True},
        ),
        ("wan", {"name": "rcm", "guidance_scale": 2.0, "student_update_freq": 2}, {}),
    ],
)
def test_the_stock_pipeline_draws_our_pictures(
    family: str, method: dict[str, Any], student: dict[str, Any], tiny_families: Families, tmp_path: Path
) -> None:
    """In one step; later steps of these pipelines draw their noise from the global generator."""
    runner = trained(tiny_families(family), tmp_path / "run", method, student)
    pipeline: Any = DiffusionPipeline.from_pretrained(runner.run / "pipeline", trust_remote_code=True)
    calls = json.loads((runner.run / "pipeline" / "sampling.json").read_text())
    ours: Any = runner.method
    found = ours.space.decode(ours.sample(PROMPTS, 1, seeded(2, 0)))
    drawn = pipeline(PROMPTS, generator=seeded(2, 0), output_type="pt", **calls["1"])
    images = drawn.frames[:, 0] if family == "wan" else drawn.images
    expected = (found.detach() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images.float(), expected.float(), rtol=0, atol=2e-4)
    assert expected.std() > 0.01
    for n in ("2", "4"):
        several = pipeline(PROMPTS, generator=seeded(2, 0), output_type="pt", **calls[n])
        assert len(several[0]) == 2
    if family in ("sd3", "flux", "wan"):
        times = torch.tensor(ours.sampling.times, dtype=torch.float64)
        straight = ours.sampling.own.time_of(ours.process.log_snr(times))
        assert pipeline.scheduler.sigmas.tolist() == pytest.approx([*straight.tolist(), 0.0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained"), [("wan", "2,837,993,600"), ("flux", "209,190,912")], ids=["wan", "flux"]
)
def test_recipes_pass_a_dry_run(
    name: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = describe(load_config(read_yaml(CONFIGS / name / "rcm.yaml")))
    assert trained in text and "not estimated" not in text
