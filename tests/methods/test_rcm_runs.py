"""rCM and DMD2 in the runner: splits follow one run, averages are the student's, plain diffusers opens the exports."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.methods.score_distillation.rcm import RCM
from fewstep.distill.methods.score_distillation.settings import RCMSettings
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from fewstep.distill.training.runner import Runner
from fewstep.pipelines.unet_norms import NormedUNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from ..runs import train, train_in_two_processes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "rcm": {
        "name": "rcm",
        "guidance_scale": 2.0,
        "student_update_freq": 2,
        "tangent_warmup": 1,
        "fake_score_lr": 5e-4,
    },
    "dmd2": {"name": "dmd2", "guidance_scale": 2.0, "student_update_freq": 2},
}
PIXELS = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 16], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip

# Arguments: call by pipeline folder as JSON, file to write.
PLAIN_DIFFUSERS = """
import json, sys
import torch
from diffusers import DiffusionPipeline

calls, output = sys.argv[1:]
out = {}
for folder, call in json.loads(calls).items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for steps, arguments in json.load(open(folder + "/sampling.json")).items():
        generator = [torch.Generator().manual_seed(i) for i in (3, 8)]
        images = pipe(**call, **arguments, generator=generator, output_type="latent").images
        out.setdefault(folder, {})[steps] = images
assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
torch.save(out, output)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def tree(teacher: Path, run: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": METHODS[name],
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "adam_beta1": 0.0,
        "adam_epsilon": 1e-3,
        "max_grad_norm": None,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        **changes,
    }


@pytest.fixture(scope="module", params=list(METHODS))
def reference(
    request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Runner]:
    run = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, train(tree(tiny_pipeline, run, request.param))


def state(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(run / f"checkpoint-{step}" / "state.safetensors")


# Adam divides each gradient by its own size: the rounding of sums in another order, 1e-7 of the largest gradient, is
# 1e-5 and more of small ones.
OTHER_SUMS = 1e-5


def assert_near(run: Path, reference: Path, tolerance: float = 1e-6) -> None:
    """Every player's weights, each player on its own."""
    ours, theirs = state(run), state(reference)
    assert ours.keys() == theirs.keys()
    for player in {k.split(".")[1] for k in ours}:
        names = sorted(k for k in ours if k.split(".")[1] == player)
        a, b = (torch.cat([w[k].flatten().double() for k in names]) for w in (ours, theirs))
        assert ((a - b).norm() / b.norm()).item() < tolerance, player


def test_accumulated_batches_follow_whole_ones(
    reference: tuple[str, Runner], tiny_pipeline: Path, tmp_path: Path
) -> None:
    name, whole = reference
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(tree(tiny_pipeline, tmp_path / "run", name, **changes))
    assert_near(tmp_path / "run", whole.run, OTHER_SUMS)


def test_gradient_checkpointing_changes_nothing(
    reference: tuple[str, Runner], tiny_pipeline: Path, tmp_path: Path
) -> None:
    name, plain = reference
    train(tree(tiny_pipeline, tmp_path / "run", name, gradient_checkpointing=True))
    assert_near(tmp_path / "run", plain.run)


@pytest.mark.slow
def test_two_processes_follow_one(reference: tuple[str, Runner], tiny_pipeline: Path, tmp_path: Path) -> None:
    name, one = reference
    train_in_two_processes(tree(tiny_pipeline, tmp_path / "run", name, train_batch_size=2), tmp_path)
    assert_near(tmp_path / "run", one.run, OTHER_SUMS)


def test_players_move_in_their_turns_and_only_the_student_is_averaged(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    """tangent_warmup 1: the student at 0 and 1, 3, 5, the fake score at 2, 4, whose learning rate is its own."""
    runner = train(tree(tiny_pipeline, tmp_path / "run", "rcm", use_ema=True, ema_std=0.1))
    assert runner.updates == {"student": 4, "fake_score": 2}
    kept = state(tmp_path / "run")
    assert int(kept["ema.updates"]) == 4
    assert not any(k.startswith("ema.fake_score") for k in kept)
    rates = {k: o.param_groups[0]["lr"] for k, o in runner.optimisers.items()}
    assert rates == {"student": 1e-3, "fake_score": 5e-4}
    before = state(tmp_path / "run", 3)
    for player in ("student", "fake_score"):
        assert any(
            not torch.equal(v, before[k]) for k, v in kept.items() if k.startswith(f"method.{player}.")
        )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["student/loss" in row for row in log] == [True, True, False, True, False, True]
    assert "student/score" not in log[0] and "student/score" in log[1] and "fake_score/loss" in log[2]


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    run = tmp_path_factory.mktemp("lora") / "run"
    student = {"kind": "lora", "rank": 2, "lora_alpha": 4}
    return train(tree(tiny_pipeline, run, "dmd2", student=student, use_ema=True, ema_decay=0.5))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """sCT from scratch in TrigFlow, without a teacher."""
    run = tmp_path_factory.mktemp("pixels") / "run"
    settings = tree(run, run, "rcm", student={"init": "scratch", "network": PIXELS}, resolution=16)
    settings["method"] = {
        "name": "rcm",
        "source": "data",
        "score_weight": 0.0,
        "sigma_data": 0.5,
        "adaptive": True,
    }
    settings["method"] |= {"times": [1.1]}
    del settings["teacher"]
    return train(settings | {"validation_steps": STEPS, "validation_prompts": ["a", "b"]})


@pytest.mark.parametrize("reference", ["rcm"], indirect=True)
def test_plain_diffusers_reproduces_our_samples(
    reference: tuple[str, Runner], lora: Runner, pixels: Runner, tmp_path: Path
) -> None:
    text: dict[str, Any] = {"prompt": ["red cat", "dog"]}
    calls = {reference[1]: text, lora: text, pixels: {"batch_size": 2}}
    given = json.dumps({str(runner.run / "pipeline"): call for runner, call in calls.items()})
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, given, "out.pt"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    theirs: dict[str, dict[str, Tensor]] = torch.load(tmp_path / "out.pt")
    for runner in calls:
        method, found = runner.method.eval(), theirs[str(runner.run / "pipeline")]
        assert list(found) == (["1", "2"] if runner is pixels else ["1", "2", "3", "4"])
        with runner._averaged():
            for steps, latents in found.items():
                generators = [torch.Generator().manual_seed(i) for i in (3, 8)]
                ours = method.sample(["red cat", "dog"], int(steps), generators)
                assert ((ours - latents).norm() / latents.norm()).item() < 1e-5, steps


@pytest.mark.parametrize("reference", ["rcm"], indirect=True)
def test_what_stands_in_the_folders(reference: tuple[str, Runner], lora: Runner, pixels: Runner) -> None:
    """Stock classes for texts, the LoRA's file beside it fused, one file of ours for pixels."""
    for run in (reference[1].run, lora.run):
        index = json.loads((run / "pipeline" / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline"
        assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert (lora.run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(lora.config.teacher.path)
    pipe.load_lora_weights(str(lora.run / "lora"))
    index = json.loads((pixels.run / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_trigflow", "TrigFlowPipeline"]
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    assert (pixels.run / "pipeline" / "pipeline_trigflow.py").is_file()
    assert (pixels.run / "samples" / f"step-{STEPS:06d}.png").is_file()
    assert "ema" not in " ".join(state(pixels.run))


@pytest.mark.parametrize("name", ["emoji/scm", "emoji/rcm", "emoji/dmd2", "cifar10/scm"])
def test_recipes_pass_a_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = describe(load_config(read_yaml(CONFIGS / f"{name}.yaml")))
    assert "activations, estimate" in text and "not estimated" not in text


def test_new_networks_take_the_norm_of_the_settings() -> None:
    student = StudentSettings(init="scratch", network=PIXELS, norm="non_scaling")
    settings = RCMSettings(source="data", score_weight=0.0)
    method = RCM(settings, Parts(None, student, [], resolution=16))
    assert isinstance(method.student.network, NormedUNet2DModel)
