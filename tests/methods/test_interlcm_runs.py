"""InterLCM in the runner: players, splits, resumption, the export in a fresh process without this project, recipes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.generator import fresh_from
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.interlcm import InterLCM
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file

from ..runs import train, train_in_two_processes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 4
SEEDS = (3, 8)

PLAIN_DIFFUSERS = """
import json, sys
import torch
import yaml
from diffusers import DiffusionPipeline

folder, pictures, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
arguments = json.load(open(folder + "/sampling.json"))["2"]
calls = {"unet": 0, "controlnet": 0, "visual_encoder": 0}
for name in calls:
    count = lambda module, args, name=name: calls.update({name: calls[name] + 1})
    getattr(pipe, name).register_forward_pre_hook(count)
made = {}
for fix in ("none", "wavelet"):
    generator = [torch.Generator().manual_seed(i) for i in (3, 8)]
    made[fix] = pipe(
        torch.load(pictures), generator=generator, output_type="pt", colour_fix=fix, **arguments
    ).images
assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
torch.save({"images": made, "calls": calls, "kind": type(pipe).__name__}, output)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def tree(student: Path, run: Path, method: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "teacher": {"path": str(student)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {
            "name": "interlcm",
            "degradation": {"kernel_size": 3, "blur": [0.1, 1.0], "downsample": [1.0, 3.0]},
            "start_index": 2,
            "guidance_scale": 3.0,
            "visual": {"image_encoder": "efflite0", "channels": [32, 32], "blocks_per_level": 1},
            "perceptual": "efflite0",
            "gan_start_step": 2,
            "discriminator": {"width": 4, "layers": 1},
            **(method or {}),
        },
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "adam_weight_decay": 0.0,
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_steps": STEPS,
        "validation_prompts": ["red cat", "dog"],
        "logging_steps": 1,
        "checkpointing_steps": 2,
        **changes,
    }


@pytest.fixture(scope="module")
def run(lcm_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return train(tree(lcm_pipeline, tmp_path_factory.mktemp("interlcm") / "run"))


def distance(run: Path, reference: Path, step: int = STEPS) -> float:
    """Relative, between checkpoints of the same step."""
    states = [load_file(r / f"checkpoint-{step}" / "state.safetensors") for r in (run, reference)]
    assert states[0].keys() == states[1].keys()
    a, b = (torch.cat([s[k].flatten().double() for k in sorted(s)]) for s in states)
    return ((a - b).norm() / b.norm()).item()


def test_the_discriminator_joins_late(run: Runner) -> None:
    rows = [json.loads(line) for line in (run.run / "log.jsonl").read_text().splitlines()]
    joined = ["discriminator/loss" in row for row in rows]
    assert joined == [False, False, True, True] and "restorer/adversarial" in rows[2]
    for row in rows:
        parts = row["restorer/l1"] + row["restorer/perceptual"] + 0.1 * row.get("restorer/adversarial", 0)
        assert row["restorer/loss"] == pytest.approx(parts, rel=1e-5)
    assert run.updates == {"restorer": STEPS, "discriminator": 2}
    assert (run.run / "samples" / f"step-{STEPS:06d}.png").is_file()


def test_accumulated_batches_follow_whole_ones(run: Runner, lcm_pipeline: Path, tmp_path: Path) -> None:
    """Before the discriminator joins, whose norms have the moments of a micro-batch."""
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 2}
    train(tree(lcm_pipeline, tmp_path / "run", **changes))
    assert distance(tmp_path / "run", run.run, 2) < 1e-5


@pytest.mark.slow
def test_two_processes_follow_one(run: Runner, lcm_pipeline: Path, tmp_path: Path) -> None:
    """Likewise; then they go on with the discriminator."""
    train_in_two_processes(tree(lcm_pipeline, tmp_path / "run", train_batch_size=2), tmp_path)
    assert distance(tmp_path / "run", run.run, 2) < 1e-5
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS and "discriminator/loss" in last


def test_a_resumed_run_ends_where_a_whole_one_does(run: Runner, lcm_pipeline: Path, tmp_path: Path) -> None:
    train(tree(lcm_pipeline, tmp_path / "run"))
    (tmp_path / "run" / "exported.json").unlink()
    (tmp_path / "run" / f"checkpoint-{STEPS}").rename(tmp_path / "gone")
    train(tree(lcm_pipeline, tmp_path / "run"))
    assert distance(tmp_path / "run", run.run) == 0


def test_plain_diffusers_restores_as_the_averaged_encoders_do(run: Runner, tmp_path: Path) -> None:
    method, folder = run.method, run.run / "pipeline"
    assert isinstance(method, InterLCM)
    pictures = torch.rand(2, 3, 16, 16)
    torch.save(pictures, tmp_path / "pictures.pt")
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, str(folder), str(tmp_path / "pictures.pt"), str(tmp_path / "out.pt")],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    made = torch.load(tmp_path / "out.pt")
    assert made["calls"] == {"unet": 4, "controlnet": 4, "visual_encoder": 2}  # two calls of two steps
    assert made["kind"] == "RestorationPipeline"
    outputs = []
    for average in (True, False):
        with torch.no_grad(), run._averaged() if average else torch.no_grad():
            generators = [torch.Generator().manual_seed(i) for i in SEEDS]
            outputs.append(method.restored(2 * pictures - 1, fresh_from(generators)) / 2 + 0.5)
    assert (made["images"]["none"] - outputs[0].clamp(0, 1)).abs().max() < 1e-4
    assert (outputs[1].clamp(0, 1) - outputs[0].clamp(0, 1)).abs().max() > 1e-3
    assert (made["images"]["wavelet"] - made["images"]["none"]).abs().max() > 1e-3


def test_the_encoders_alone_and_the_notes(run: Runner) -> None:
    folder = run.run / "pipeline"
    alone = ControlNetModel.from_pretrained(folder / "controlnet")
    with run.ema.swapped():
        own = {k: v.clone() for k, v in run.method.spatial.state_dict().items()}
    assert all(torch.equal(own[k], v) for k, v in alone.state_dict().items())
    notes = json.loads((folder / "restoration.json").read_text())
    assert notes["degradation"]["downsample"] == [1.0, 3.0] and notes["degradation"]["jpeg"] == [60, 100]
    assert notes["start_index"] == 2 and notes["guidance_scale"] == 3.0
    assert {p.name for p in folder.rglob("*.py")} == {"pipeline_restoration.py", "visual_encoder.py"}
    for path in folder.rglob("*.json"):
        assert str(run.run.parent) not in path.read_text()
    encoder = json.loads((folder / "model_index.json").read_text())["image_encoder"]
    assert encoder == ["transformers", "TimmWrapperModel"]
    assert "Its image encoder needs timm: `pip install timm`." in (folder / "README.md").read_text()


def test_the_recipe_of_the_embedded_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_yaml(CONFIGS / "emoji" / "interlcm.yaml")
    text = describe(load_config(recipe | {"teacher": {"path": "emoji-sd"}}))
    assert "trained as restorer" in text and "nothing" in text.split("must be downloaded")[1]
    monkeypatch.chdir(tmp_path)  # where no run of lcd.yaml is
    with pytest.raises(UserError, match=r"teacher.path: no folder runs/emoji/lcd"):
        describe(load_config(recipe))


def test_the_recipe_of_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """361,279,120 parameters of lllyasviel's ControlNets and 12,960,845 of the visual encoder are the restorer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = describe(load_config(read_yaml(CONFIGS / "sd15" / "interlcm.yaml")))
    assert "374,239,965" in text and "6,960,961" in text
    assert "image encoder openai/clip-vit-base-patch16" in text and "VGG16 of torchvision" in text
    assert "not estimated" not in text
