"""Students of SDXL, SD3, Flux and Wan: what plain diffusers opens is what was trained."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Parts
from fewstep.distill.training.runner import Runner
from fewstep.pipelines.export import Export, write_adapter
from safetensors.torch import load_file

Families = Callable[[str], Path]
PROMPTS = ["red cat", "dog"]

# Arguments: the full run, the LoRA run, the teacher, the file to write.
PLAIN_DIFFUSERS = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler

full, lora, teacher, output = sys.argv[1:]
images = {}

def draw(name, pipe, folder):
    with open(folder + "/sampling.json") as file:
        calls = json.load(file)
    images[f"{name} class"] = np.array(type(pipe).__name__)
    for n in "12":
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images[f"{name} {n}"] = pipe(["red cat", "dog"], generator=generators, output_type="np", **calls[n]).images

draw("full", DiffusionPipeline.from_pretrained(full + "/pipeline"), full + "/pipeline")
draw("fused", DiffusionPipeline.from_pretrained(lora + "/pipeline"), lora + "/pipeline")
pipe = DiffusionPipeline.from_pretrained(teacher)
pipe.scheduler = LCMScheduler.from_pretrained(lora + "/lora")
pipe.load_lora_weights(lora + "/lora")
draw("lora", pipe, lora + "/lora")

assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
np.savez(output, **images)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def sdxl_runs(tiny_families: Families, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runner]:
    """Two steps of latent consistency distillation: all weights at 32 px, which are not the pipeline's own 16, and a
    LoRA whose alpha is not its rank."""
    runs = {}
    for name, student in (("full", {}), ("lora", {"kind": "lora", "rank": 4, "lora_alpha": 12})):
        tree = {
            "output_dir": str(tmp_path_factory.mktemp(name) / "run"),
            "teacher": {"path": str(tiny_families("sdxl"))},
            "student": student,
            "data": {"name": "emoji-noto", "split": "score"},
            "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2}
            | ({} if student else {"guidance_dim": 16}),
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 5e-3,
            "validation_steps": 2,
            "resolution": 32 if name == "full" else None,
        }
        runs[name] = Runner(load_config(tree))
        runs[name].train()
    return runs


@pytest.fixture(scope="module")
def plain(
    sdxl_runs: dict[str, Runner], tiny_families: Families, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Images by plain diffusers in a process that has never imported this package."""
    output = tmp_path_factory.mktemp("plain") / "images.npz"
    paths = [sdxl_runs["full"].run, sdxl_runs["lora"].run, tiny_families("sdxl"), output]
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return dict(np.load(output))


def ours(runner: Runner, num_steps: int) -> np.ndarray:
    """Images (N, H, W, 3) in [0, 1] by our own sampler."""
    method: Any = runner.method
    with torch.no_grad():
        pictures = method.teacher.decode(method.sample(PROMPTS, num_steps, 2.0, seeded(len(PROMPTS), 0)))
    return (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", ["full", "fused", "lora"])
def test_students_of_sdxl_draw_our_images(
    name: str, num_steps: int, sdxl_runs: dict[str, Runner], plain: dict[str, np.ndarray]
) -> None:
    images = ours(sdxl_runs["full" if name == "full" else "lora"], num_steps)
    assert str(plain[f"{name} class"]) == "StableDiffusionXLPipeline"
    assert images.std() > 0.005 and np.abs(images[0] - images[1]).max() > 0.005
    assert images.shape[1:3] == ((32, 32) if name == "full" else (16, 16))
    assert np.abs(plain[f"{name} {num_steps}"] - images).max() < 1e-5


def test_the_lora_of_sdxl_matters(sdxl_runs: dict[str, Runner], plain: dict[str, np.ndarray]) -> None:
    method: Any = sdxl_runs["lora"].method
    with method.student.teacher_mode():
        without = ours(sdxl_runs["lora"], 2)
    assert np.abs(plain["lora 2"] - without).max() > 1e-4


def test_prompts_of_sdxl_are_cached_for_both_its_text_encoders(sdxl_runs: dict[str, Runner]) -> None:
    (index,) = Path(os.environ["FEWSTEP_CACHE"]).glob("prompts-*.json")
    cache = json.loads(index.read_text())
    method: Any = sdxl_runs["full"].method
    before = method.teacher.texts_hash()
    assert before in cache["key"]
    for encoder in method.teacher.text_encoders:
        weight = next(encoder.parameters())
        weight.data.flatten()[0].neg_()
        assert method.teacher.texts_hash() != before
        weight.data.flatten()[0].neg_()
    assert method.teacher.texts_hash() == before
    assert set(cache["fields"]) == {"encoder_hidden_states", "text_embeds"}


def test_batches_of_sdxl(sdxl_runs: dict[str, Runner]) -> None:
    """Prompts of the data, nothing in their place where they are dropped, the sizes of the run's resolution."""
    for name, side in (("full", 32.0), ("lora", 16.0)):
        (batch,) = sdxl_runs[name].batches.micro_batches(0)
        assert batch.condition is not None
        told, null = batch.condition.arguments, batch.condition.null().arguments
        for arguments in (told, null):
            assert arguments["time_ids"].tolist() == [[side, side, 0.0, 0.0, side, side]] * 2
        texts = ("encoder_hidden_states", "text_embeds")
        assert all(told[k].any() and not null[k].any() for k in texts)


def test_an_export_says_its_resolution_where_it_is_not_the_pipelines(tiny_families: Families) -> None:
    for resolution, size in ((None, {}), (32, {"height": 32, "width": 32})):
        teacher = Teacher.load(TeacherSettings(str(tiny_families("sdxl"))), resolution)
        calls = LCD(LCD.Settings(guidance_dim=8), Parts(teacher, StudentSettings(), [])).calls(2.0)
        assert calls["2"] == {"num_inference_steps": 2, "guidance_scale": 2.0, **size}


TARGETS = {
    "sd3": {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"},
    "flux": {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"},
    "wan": {"to_q", "to_k", "to_v", "to_out.0"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_loras_and_full_students_of_flows(name: str, tiny_families: Families, tmp_path: Path) -> None:
    """The LoRA file on the stock pipeline, the fused and the trained network give the trained student's velocity."""
    teacher = Teacher.load(TeacherSettings(str(tiny_families(name))), 16)
    assert isinstance(teacher, LatentTeacher)
    x, t, told = torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.8]), teacher.condition(PROMPTS)
    with torch.no_grad():
        before = teacher.denoiser(x, t, told).velocity
        student = Student(teacher.denoiser, StudentSettings(kind="lora", rank=2, lora_alpha=6))
        for p in student.trained().values():
            p.add_(0.1 * torch.randn(p.shape))
        trained = student.denoiser(x, t, told).velocity
        with student.teacher_mode():
            assert torch.equal(student.denoiser(x, t, told).velocity, before)
    assert (trained - before).norm() > 1e-2 * before.norm()
    layers = {k.split(".lora_")[0].split(".attn")[-1].split(".", 1)[1] for k in student.trained()}
    assert layers == TARGETS[name]

    adapter = teacher.adapter(student.lora_weights(), teacher.pipeline.scheduler)
    write_adapter(Export(None, adapter=adapter), tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(k.startswith("transformer.") for k in weights) and len(weights) == len(student.trained())
    pipe = DiffusionPipeline.from_pretrained(tiny_families(name))
    pipe.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        loaded = LatentTeacher(pipe, "stock", 16).denoiser(x, t, told).velocity
        teacher.assembled(student.fused()).save_pretrained(tmp_path / "fused")
        fused = Teacher.load(TeacherSettings(str(tmp_path / "fused")), 16).denoiser(x, t, told).velocity
    assert torch.allclose(loaded, trained, atol=1e-5) and torch.allclose(fused, trained, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_full_students_of_flows(name: str, tiny_families: Families, tmp_path: Path) -> None:
    """A float32 copy that starts as the teacher, is trained in all weights, and is exported in its pipeline."""
    teacher = Teacher.load(TeacherSettings(str(tiny_families(name))), 16)
    assert isinstance(teacher, LatentTeacher)
    x, t, told = torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.8]), teacher.condition(PROMPTS)
    student = Student(teacher.denoiser, StudentSettings())
    assert student.trained().keys() == dict(teacher.family.network.named_parameters()).keys()
    with torch.no_grad():
        before = teacher.denoiser(x, t, told).velocity
        assert torch.equal(student.eval().denoiser(x, t, told).velocity, before)
        for p in student.trained().values():
            p.add_(0.05 * torch.randn(p.shape))
        teacher.assembled(student.network).save_pretrained(tmp_path / "full")
        opened = Teacher.load(TeacherSettings(str(tmp_path / "full")), 16).denoiser(x, t, told).velocity
        trained = student.denoiser(x, t, told).velocity
        assert torch.allclose(opened, trained, atol=1e-6) and not torch.allclose(trained, before, atol=1e-2)
        assert torch.equal(teacher.denoiser(x, t, told).velocity, before)


def test_the_targets_of_a_lora_can_be_chosen(tiny_families: Families) -> None:
    teacher = Teacher.load(TeacherSettings(str(tiny_families("flux"))), 16)
    chosen = StudentSettings(kind="lora", rank=2, target_modules=("ff.net.0.proj", "x_embedder"))
    layers = {k.split(".lora_")[0] for k in Student(teacher.denoiser, chosen).trained()}
    assert layers == {"transformer_blocks.0.ff.net.0.proj", "x_embedder"}
