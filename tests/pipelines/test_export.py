"""Exports open in plain diffusers and draw our sampler's images from the same noise."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.training.runner import Runner
from fewstep.pipelines.export import forget_paths, sampling_of
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from ..runs import train

PROMPTS = ["red cat", "dog", "go"]
STEPS = (1, 2, 4)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Arguments: the full run, the LoRA run, the teacher, the file to write. What a reader of the cards would do.
PLAIN_DIFFUSERS = """
import json, os, re, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

full, lora, teacher, output = sys.argv[1:]
images = {}

def draw(name, pipe, call):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images[name] = pipe(["red cat", "dog", "go"], generator=generators, output_type="np", **call).images

def draw_all(name, pipe, folder):
    with open(os.path.join(folder, "sampling.json")) as file:
        calls = json.load(file)
    for n in "124":
        draw(f"{name} {n}", pipe, calls[n])
    return calls

pipe = DiffusionPipeline.from_pretrained(full + "/pipeline")
calls = draw_all("full", pipe, full + "/pipeline")
draw("full, weak", pipe, {**calls["2"], "guidance_scale": 2.0})
draw_all("fused", DiffusionPipeline.from_pretrained(lora + "/pipeline"), lora + "/pipeline")
pipe = StableDiffusionPipeline.from_pretrained(teacher)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora + "/lora")
draw_all("lora", pipe, lora + "/lora")

for name, run, folder in (("full", full, "pipeline"), ("fused", lora, "pipeline"), ("lora", lora, "lora")):
    os.chdir(run)
    with open(folder + "/README.md") as file:
        lines = re.search("```python\\n(.*?)```", file.read(), re.DOTALL)[1]
    lines = lines.replace(f'("{os.path.basename(teacher)}", dtype', f'("{teacher}", dtype')
    found = {}
    exec(lines, found)
    images[f"card {name}"] = np.asarray(found["image"])

half = output + "-half"
StableDiffusionPipeline.from_pretrained(teacher, dtype=torch.float16).save_pretrained(half)
assert teacher in lines
exec(lines.replace(teacher, half), found)
images["card of a half teacher"] = np.asarray(found["image"])

assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
np.savez(output, **images)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def settings(teacher: Path, output: Path, **student: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "teacher": {"path": str(teacher)},
        "student": student,
        "data": {"name": "emoji-noto"},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2}
        | ({} if student.get("kind") == "lora" else {"guidance_dim": 16}),
        "train_batch_size": 4,
        "max_train_steps": 5,
        "learning_rate": 2e-3,
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_prompts": ["red apple"],
    }


@pytest.fixture(scope="module")
def full(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Its sampling times are not those of the stock scheduler."""
    tree = settings(tiny_pipeline, tmp_path_factory.mktemp("full") / "run")
    tree["method"]["sampling_power"] = 2
    return train(tree)


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Its alpha is not its rank: a file that forgets alpha draws other images."""
    run = tmp_path_factory.mktemp("lora") / "run"
    return train(settings(tiny_pipeline, run, kind="lora", rank=4, lora_alpha=12))


@pytest.fixture(scope="module")
def plain(
    full: Runner, lora: Runner, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Images by plain diffusers in a process that has never imported this package."""
    output = tmp_path_factory.mktemp("plain") / "images.npz"
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, str(full.run), str(lora.run), str(tiny_pipeline), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(np.load(output))


def ours(runner: Runner, num_steps: int, w: float = 2.0, prompts: list[str] = PROMPTS) -> np.ndarray:
    """Images (N, H, W, 3) in [0, 1] by our own sampler with the averaged weights."""
    method: Any = runner.method
    with runner._averaged(), torch.no_grad():
        pictures = method.teacher.decode(method.sample(prompts, num_steps, w, seeded(len(prompts), 0)))
    return (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("num_steps", STEPS)
def test_a_full_student_draws_our_images(num_steps: int, full: Runner, plain: dict[str, np.ndarray]) -> None:
    images = ours(full, num_steps)
    assert images.std() > 0.01 and np.abs(images[0] - images[1]).max() > 0.01
    assert np.abs(plain[f"full {num_steps}"] - images).max() < 1e-5


def test_more_steps_are_other_images(plain: dict[str, np.ndarray]) -> None:
    for name in ("full", "fused", "lora"):
        for few, many in ((1, 2), (2, 4)):
            assert np.abs(plain[f"{name} {few}"] - plain[f"{name} {many}"]).max() > 1e-3


def test_guidance_scale_is_w_plus_1_and_live(full: Runner, plain: dict[str, np.ndarray]) -> None:
    assert np.abs(plain["full, weak"] - ours(full, 2, w=1.0)).max() < 1e-5
    assert np.abs(plain["full, weak"] - plain["full 2"]).max() > 1e-4


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", ["fused", "lora"])
def test_a_lora_draws_our_images_fused_and_loaded(
    name: str, num_steps: int, lora: Runner, plain: dict[str, np.ndarray]
) -> None:
    assert np.abs(plain[f"{name} {num_steps}"] - ours(lora, num_steps)).max() < 1e-5


def test_the_lora_matters(lora: Runner, plain: dict[str, np.ndarray]) -> None:
    method: Any = lora.method
    with method.student.teacher_mode():
        without = ours(lora, 2)
    assert np.abs(plain["lora 2"] - without).max() > 1e-3


@pytest.mark.parametrize("name", ["full", "fused", "lora"])
def test_the_lines_of_the_card_run_and_draw_two_steps(
    name: str, full: Runner, lora: Runner, plain: dict[str, np.ndarray]
) -> None:
    (image,) = ours(full if name == "full" else lora, 2, prompts=["red apple"])
    assert np.abs(plain[f"card {name}"].astype(float) - 255 * image).max() <= 1


def test_the_card_of_a_lora_draws_with_a_teacher_stored_in_half_precision(
    plain: dict[str, np.ndarray],
) -> None:
    whole, half = (plain[f"card {name}"].astype(int) for name in ("lora", "of a half teacher"))
    assert abs(whole - half).max() <= 8


def test_folders_hold_safetensors_and_no_paths(full: Runner, lora: Runner) -> None:
    for folder in (full.run / "pipeline", lora.run / "pipeline", lora.run / "lora"):
        suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert ".safetensors" in suffixes and suffixes <= {
            ".safetensors",
            ".json",
            ".md",
            ".txt",
            ".png",
            ".yaml",
        }
        for path in folder.rglob("*.json"):
            text = path.read_text()
            assert "name_or_path" not in text, path
            assert not re.search(r'"(/|~|[A-Z]:\\)[^"<]', text), path


def test_sampling_arguments(full: Runner, lora: Runner) -> None:
    calls = sampling_of(full.run / "pipeline")
    assert list(calls) == ["1", "2", "3", "4", "6", "8"]
    assert calls["4"] == {"timesteps": [999, 579, 259, 79], "guidance_scale": 3.0}
    for folder in ("pipeline", "lora"):
        assert sampling_of(lora.run / folder)["4"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert sampling_of(full.run) == {}


def test_cards_say_what_the_student_is(full: Runner, lora: Runner) -> None:
    card = (full.run / "pipeline" / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("pipeline")' in card and "| training steps | 5 of 5 |" in card
    assert "| 4 | `timesteps=[999, 579, 259, 79]`, `guidance_scale=3.0` |" in card
    card = (lora.run / "lora" / "README.md").read_text()
    assert 'pipe.load_lora_weights("lora")' in card and "LCMScheduler" in card


def test_the_fused_network_is_plain_and_the_trained_one_is_untouched(
    lora: Runner, tiny_pipeline: Path
) -> None:
    fused, teacher = load_file(lora.run / "pipeline" / WEIGHTS), load_file(tiny_pipeline / WEIGHTS)
    assert fused.keys() == teacher.keys()
    assert not torch.equal(
        fused["mid_block.resnets.0.conv1.weight"], teacher["mid_block.resnets.0.conv1.weight"]
    )
    assert torch.equal(fused["conv_in.weight"], teacher["conv_in.weight"])
    method: Any = lora.method
    layers = [m for m in method.student.network.modules() if isinstance(m, BaseTunerLayer)]
    assert layers and not any(layer.merged for layer in layers)
    saved = load_file(lora.run / "checkpoint-5" / "state.safetensors")
    weights = dict(method.named_parameters())
    names = [k.removeprefix("method.") for k in saved if k.startswith("method.")]
    assert names and all(torch.equal(weights[k], saved[f"method.{k}"]) for k in names)


def test_the_lora_file_has_peft_keys_of_the_unet(lora: Runner) -> None:
    weights = load_file(lora.run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(re.fullmatch(r"unet\..+\.lora_[AB]\.weight", k) for k in weights)
    assert {v.shape[0] for k, v in weights.items() if ".lora_A." in k} == {4}


def test_fusing_can_be_switched_off_and_on_again_without_training(
    lora: Runner, tiny_pipeline: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    student = {"kind": "lora", "rank": 4, "lora_alpha": 12}
    tree = settings(tiny_pipeline, run, **student, export_fused=False)
    train(tree)
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file() and not (run / "pipeline").exists()
    assert Runner(load_config(tree)).finished()
    tree = settings(tiny_pipeline, run, **student)
    assert not Runner(load_config(tree)).finished()
    log = (run / "log.jsonl").read_text()
    assert train(tree).finished() and (run / "log.jsonl").read_text() == log
    ours, reference = load_file(run / "pipeline" / WEIGHTS), load_file(lora.run / "pipeline" / WEIGHTS)
    assert all(torch.equal(ours[k], reference[k]) for k in reference)


@pytest.mark.parametrize("student", [{}, {"kind": "lora", "rank": 4, "lora_alpha": 12}], ids=["full", "lora"])
def test_a_half_precision_run_exports_what_plain_diffusers_draws(
    student: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Its images are those of its own networks, apart from their rounding to bfloat16 on the way."""
    run = tmp_path / "run"
    runner = train({**settings(tiny_pipeline, run, **student), "mixed_precision": "bf16"})
    method: Any = runner.method
    assert method.teacher.pipeline.text_encoder.dtype == torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    call = sampling_of(run / "pipeline")["2"]
    images = pipe(PROMPTS, generator=seeded(3, 0), output_type="np", **call).images
    assert np.abs(images - ours(runner, 2)).mean() < 0.02 < images.std()


def test_forgetting_paths_leaves_other_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":1,   "b": "/keep"}')
    forget_paths(path)
    assert path.read_text() == '{"a":1,   "b": "/keep"}'
    path.write_text('{"a": 1, "_name_or_path": "/home/x", "name_or_path": "y"}')
    forget_paths(path)
    assert json.loads(path.read_text()) == {"a": 1}
    path.write_text("[1]")
    forget_paths(path)
    assert path.read_text() == "[1]"
