"""NCT in the runner: splits, resumption, and the export in a fresh process without this project."""

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
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.nct import NCT
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file

from ..runs import train, train_in_two_processes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 4
PROMPTS = ["red cat", "dog"]

PLAIN_DIFFUSERS = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, pictures, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
arguments = json.load(open(folder + "/sampling.json"))["1"]
calls = {"unet": 0, "controlnet": 0}
for name in calls:
    count = lambda module, args, name=name: calls.update({name: calls[name] + 1})
    getattr(pipe, name).register_forward_pre_hook(count)
generator = [torch.Generator().manual_seed(i) for i in (3, 8)]
made = pipe(
    ["red cat", "dog"], image=torch.load(pictures), **arguments, generator=generator, output_type="latent"
).images
assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
torch.save({"latents": made, "calls": calls, "kind": type(pipe).__name__}, output)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def tree(teacher: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {
            "name": "nct",
            "control": {"name": "superres", "factor": 4},
            "dual_lr": 5.0,
            "margin": 0.01,
        },
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_steps": STEPS,
        "validation_prompts": PROMPTS,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        **changes,
    }


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return train(tree(tiny_pipeline, tmp_path_factory.mktemp("nct") / "run"))


def distance(run: Path, reference: Path) -> float:
    """Relative, between the last checkpoints, lambda among them."""
    states = [load_file(r / f"checkpoint-{STEPS}" / "state.safetensors") for r in (run, reference)]
    assert states[0].keys() == states[1].keys() and "method.multiplier.value" in states[0]
    a, b = (torch.cat([s[k].flatten().double() for k in sorted(s)]) for s in states)
    return ((a - b).norm() / b.norm()).item()


def test_the_run_trains_and_says_what_lambda_does(run: Runner) -> None:
    rows = [json.loads(line) for line in (run.run / "log.jsonl").read_text().splitlines()]
    weights = [row["boundary_weight"] for row in rows]
    assert rows[0]["boundary"] == 0 and weights[0] == 1
    assert weights[1] == pytest.approx(1 - 5 * 0.01)
    assert weights[2] == pytest.approx(weights[1] + 5 * (rows[1]["boundary"] - 0.01))
    assert all(
        r["loss"] == pytest.approx(r["consistency"] + r["boundary_weight"] * r["boundary"]) for r in rows
    )
    assert rows[3]["boundary"] > 0
    assert (run.run / "samples" / f"step-{STEPS:06d}.png").is_file()


def test_accumulated_batches_follow_whole_ones(run: Runner, tiny_pipeline: Path, tmp_path: Path) -> None:
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(tree(tiny_pipeline, tmp_path / "run", **changes))
    assert distance(tmp_path / "run", run.run) < 1e-5


@pytest.mark.slow
def test_two_processes_follow_one(run: Runner, tiny_pipeline: Path, tmp_path: Path) -> None:
    train_in_two_processes(tree(tiny_pipeline, tmp_path / "run", train_batch_size=2), tmp_path)
    assert distance(tmp_path / "run", run.run) < 1e-5
    states = [load_file(r / f"checkpoint-{STEPS}" / "state.safetensors") for r in (tmp_path / "run", run.run)]
    ours, theirs = (s["method.multiplier.value"].item() for s in states)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_resumed_run_ends_where_a_whole_one_does(run: Runner, tiny_pipeline: Path, tmp_path: Path) -> None:
    train(tree(tiny_pipeline, tmp_path / "run"))
    (tmp_path / "run" / "exported.json").unlink()
    kept = tmp_path / "run" / f"checkpoint-{STEPS}"
    kept.rename(tmp_path / "gone")
    train(tree(tiny_pipeline, tmp_path / "run"))
    assert distance(tmp_path / "run", run.run) == 0


def test_plain_diffusers_repeats_the_averaged_sample(run: Runner, tmp_path: Path) -> None:
    method, folder = run.method, run.run / "pipeline"
    assert isinstance(method, NCT)
    pictures = torch.rand(2, 3, 16, 16)
    torch.save(pictures, tmp_path / "pictures.pt")
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, str(folder), str(tmp_path / "pictures.pt"), str(tmp_path / "out.pt")],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    made = torch.load(tmp_path / "out.pt")
    assert made["calls"] == {"unet": 1, "controlnet": 1}
    assert made["kind"] == "StableDiffusionControlNetPipeline"
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 8)])
    told = method.teacher.condition(PROMPTS)
    with torch.no_grad(), run.ema.swapped():
        ours = method.adapter(noise, told, pictures)
    with torch.no_grad():
        raw = method.adapter(noise, told, pictures)
    scale = ours.abs().max()
    assert (made["latents"] - ours).abs().max() < 1e-5 * scale
    assert (raw - ours).abs().max() > 1e-4 * scale


def test_the_adapter_alone_and_its_notes(run: Runner) -> None:
    folder = run.run / "pipeline"
    alone = ControlNetModel.from_pretrained(folder / "controlnet")
    with run.ema.swapped():
        own = {k: v.clone() for k, v in run.method.controlnet.state_dict().items()}
    assert all(torch.equal(own[k], v) for k, v in alone.state_dict().items())
    notes = json.loads((folder / "control.json").read_text())
    assert notes["control"] == {"name": "superres", "factor": 4}
    assert notes["timestep"] == 999 and notes["levels"] == 10 and notes["margin"] == 0.01
    assert notes["boundary_weight"] == run.method.multiplier.value.item()
    card = (folder / "README.md").read_text()
    assert 'condition = load_image("condition.png")' in card and "image=condition, timesteps=[999]" in card
    assert str(run.run.parent) not in card + json.dumps(notes)


@pytest.mark.parametrize("name", ["emoji/nct_canny", "emoji/nct_superres"])
def test_recipes_of_the_embedded_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_yaml(CONFIGS / f"{name}.yaml")
    text = describe(load_config(recipe | {"teacher": {"path": "emoji-sd"}}))
    assert "trained" in text
    monkeypatch.chdir(tmp_path)  # where no run of dmd2.yaml is
    with pytest.raises(UserError, match=r"teacher.path: no folder runs/emoji/dmd2_one_step"):
        describe(load_config(recipe))


@pytest.mark.parametrize("name", ["nct_canny", "nct_superres"])
def test_recipes_of_stable_diffusion(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """361 M parameters are trained: lllyasviel's ControlNets of SD 1.5 have 361,279,120."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = describe(load_config(read_yaml(CONFIGS / "sd15" / f"{name}.yaml")))
    assert "361,279,120" in text


def test_a_wrong_key_of_a_control_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    for control, message in (
        ({"name": "superres", "factor": 1}, r"method.control.factor: 1 does not fit"),
        (
            {"name": "superres", "facto": 4},
            r"method.control.facto: no such key; the nearest is factor",
        ),
        ({"name": "cany"}, r"method.control.name: there is no 'cany'; the nearest is canny"),
        ({"low": 3}, r"method.control: .* has no name; write"),
    ):
        settings = tree(tiny_pipeline, tmp_path, method={"name": "nct", "control": control})
        with pytest.raises(UserError, match=message):
            load_config(settings)
