"""NCT with an IP-Adapter in the runner: the card's own lines in a fresh process, resumption, recipes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.nct import NCT
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.training.runner import Runner
from PIL import Image
from safetensors.torch import load_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 4
PROMPTS = ["red cat", "dog"]
AGAIN = """
calls = []
pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
made = pipe(
    "red apple", ip_adapter_image_embeds=[embeds], timesteps=[999], guidance_scale=1.0,
    generator=torch.Generator().manual_seed(0), output_type="latent",
).images
import sys
assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
torch.save({"latents": made, "calls": len(calls), "size": image.size, "kind": type(pipe).__name__}, "out.pt")
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def train(teacher: Path, run: Path, **changes: Any) -> Runner:
    settings = {
        "output_dir": str(run),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "nct", "control": {"name": "image"}, "dual_lr": 5.0, "prompt_dropout": 0.05},
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "learning_rate": 0.3,
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_steps": STEPS,
        "validation_prompts": PROMPTS,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        **changes,
    }
    runner = Runner(load_config(settings))
    runner.train()
    return runner


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return train(tiny_pipeline, tmp_path_factory.mktemp("nct_image") / "run")


def test_the_cards_lines_repeat_the_averaged_sample(run: Runner) -> None:
    method, card = run.method, (run.run / "pipeline" / "README.md").read_text()
    assert isinstance(method, NCT)
    pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(run.run / "prompt.png")
    code = card.split("```python\n")[1].split("```")[0]
    child = subprocess.run(
        [sys.executable, "-c", code + AGAIN],
        cwd=run.run,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    made = torch.load(run.run / "out.pt")
    assert made["kind"] == "StableDiffusionPipeline" and made["size"] == (16, 16) and made["calls"] == 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = method.teacher.condition(["red apple"])
    seen = method.view(pixels.permute(2, 0, 1)[None] / 255, Draws(0, 0, range(1)))
    with torch.no_grad():
        raw, plain = method.adapter(noise, told, seen), method.generator(noise, told)
        with run.ema.swapped():
            ours = method.adapter(noise, told, seen)
    size = ours.abs().max()
    assert (made["latents"] - ours).abs().max() < 1e-5 * size
    assert (raw - ours).abs().max() > 1e-4 * size and (plain - ours).abs().max() > 1e-4 * size


def test_the_adapter_alone_and_its_notes(run: Runner) -> None:
    folder = run.run / "pipeline"
    alone = load_file(folder / "ip_adapter" / "ip_adapter.safetensors")
    assert {k for k in alone if k.startswith("ip_adapter.")} == {
        f"ip_adapter.{i}.to_{kind}_ip.weight" for i in (1, 3, 5, 7) for kind in "kv"
    }
    assert {k for k in alone if k.startswith("image_proj.")} == {
        f"image_proj.{k}" for k in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    }
    notes = json.loads((folder / "control.json").read_text())
    assert notes["control"] == {"name": "image", "encoder": "efflite0"} and notes["timestep"] == 999
    assert notes["boundary_weight"] == run.method.multiplier.value.item()
    text = (folder / "README.md").read_text() + json.dumps(notes)
    assert str(run.run.parent) not in text
    assert (run.run / "samples" / f"step-{STEPS:06d}.png").is_file()


def test_a_resumed_run_ends_where_a_whole_one_does(run: Runner, tiny_pipeline: Path, tmp_path: Path) -> None:
    train(tiny_pipeline, tmp_path / "run")
    (tmp_path / "run" / "exported.json").unlink()
    (tmp_path / "run" / f"checkpoint-{STEPS}").rename(tmp_path / "gone")
    train(tiny_pipeline, tmp_path / "run")
    states = [load_file(r / f"checkpoint-{STEPS}" / "state.safetensors") for r in (run.run, tmp_path / "run")]
    assert states[0].keys() == states[1].keys() and "method.multiplier.value" in states[0]
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


def test_the_emoji_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_yaml(CONFIGS / "emoji" / "nct_image.yaml")
    text = describe(load_config(recipe | {"teacher": {"path": "emoji-sd"}}))
    assert "803,584" in text
    monkeypatch.chdir(tmp_path)  # where no run of dmd2.yaml is
    with pytest.raises(UserError, match=r"teacher.path: no folder runs/emoji/dmd2_one_step"):
        describe(load_config(recipe))


def test_the_recipe_of_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """22 M are trained, as of IP-Adapter's ip-adapter_sd15; beside the encoder of 632.08 M of its model card."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = describe(load_config(read_yaml(CONFIGS / "sd15" / "nct_image.yaml")))
    tokens, cross = 4 * 1024 * 768 + 4 * 768 + 2 * 768, 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert f"{tokens + cross:,}" in text and f"{tokens + cross + 632_076_800:,}" in text
    assert "image encoder h94/IP-Adapter/models/image_encoder" in text
