"""Methods with several players in the runner: resumed and split into processes, a run ends where the plain one ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file

from ..runs import lasting, train_in_two_processes

STEPS = 5
SCOTT = {"name": "scott", "discriminator_rank": 4, "discriminator_lr": 1e-4}
LRM = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "patch_size": 2, "embed_dim": 8, "text_layers": 1,
       "pretrain_steps": 2, "learning_rate": 1e-4}  # fmt: skip
RG_LCD = {"name": "rg_lcd", "reward": "lite2-minilm", "lrm": LRM}
METHODS = {"scott": SCOTT, "rg_lcd": RG_LCD}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def tree(teacher: Path, run: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {**METHODS[name], "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 5e-5,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        **changes,
    }


@pytest.fixture(scope="module", params=list(METHODS))
def reference(
    request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Name of the method and folder of the run that nothing disturbs."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    Runner(load_config(tree(tiny_pipeline, run, request.param))).train()
    return request.param, run


def state(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / "state.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [lasting(line) for line in lines]


def test_a_resumed_run_is_the_plain_one(
    reference: tuple[str, Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Bit for bit: every player's weights and every line of the log."""
    name, plain = reference
    run = tmp_path / "run"
    runner = Runner(load_config(tree(tiny_pipeline, run, name)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        advance = Runner._iteration

        def halt(self: Runner, iteration: int) -> Any:
            if iteration == STEPS - 1:
                raise KeyboardInterrupt
            return advance(self, iteration)

        patch.setattr(Runner, "_iteration", halt)
        runner.train()
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-3"]
    Runner(load_config(tree(tiny_pipeline, run, name))).train()
    ours, theirs = state(run), state(plain)
    assert ours.keys() == theirs.keys() and [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert log(run) == log(plain)


def test_every_player_moves_at_its_own_rate_and_the_checkpoint_has_them_all(
    reference: tuple[str, Path], tiny_pipeline: Path
) -> None:
    name, run = reference
    before, after = state(run, 3), state(run)
    parts = {"scott": "method.discriminator.", "rg_lcd": "method.lrm."}
    for prefix in ("method.student.", "method.target.", parts[name]):
        moved = [k for k in after if k.startswith(prefix) and not torch.equal(after[k], before[k])]
        assert moved, prefix
    locked = "method.lrm.vision.transformer.resblocks.0.mlp.c_fc.weight"
    assert name == "scott" or torch.equal(after[locked], before[locked])
    assert not any("reward" in k for k in after)
    progress = json.loads((run / f"checkpoint-{STEPS}" / "progress.json").read_text())
    assert (
        progress["updates"]
        == {
            "scott": {"student": STEPS, "discriminator": STEPS},
            "rg_lcd": {"student": STEPS - 2, "latent_clip": 2, "lrm": STEPS - 2},
        }[name]
    )
    saved = torch.load(run / f"checkpoint-{STEPS}" / "optimizers.pt", weights_only=False)
    rates = {k: v["param_groups"][0]["lr"] for k, v in saved["players"].items()}
    assert (
        rates
        == {
            "scott": {"student": 5e-5, "discriminator": 1e-4},
            "rg_lcd": {"student": 5e-5, "latent_clip": 5e-4, "lrm": 1e-4},
        }[name]
    )


@pytest.mark.slow
def test_two_processes_follow_one(reference: tuple[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    """The proxy's contrastive loss compares the rows of one process, so that its weights alone may differ."""
    name, plain = reference
    train_in_two_processes(tree(tiny_pipeline, tmp_path / "run", name, train_batch_size=2), tmp_path)
    ours, theirs = log(tmp_path / "run"), log(plain)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    keys = ["student/distance", *(["student/adversarial", "discriminator/loss"] if name == "scott" else [])]
    for a, b in zip(ours, theirs, strict=True):
        for key in (k for k in keys if k in b):
            assert a[key] == pytest.approx(b[key], abs=2e-4), (a["step"], key)
