"""`teacher.lora`: a style in the frozen base before anything else sees it, and named by what is exported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.cli import main
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.errors import UserError
from fewstep.distill.models.lora_files import fuse_lora
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.runner import Runner
from fewstep.pipelines.export import Export, write_adapter
from safetensors.torch import save_file

PROMPTS = ["red cat", "dog"]


def style_of(folder: Path, output: Path) -> Path:
    """A LoRA file with an effect."""
    teacher = Teacher.load(TeacherSettings(str(folder)), 16)
    assert isinstance(teacher, LatentTeacher)
    student = Student(teacher.denoiser, StudentSettings(kind="lora", rank=2, lora_alpha=2))
    with torch.no_grad():
        for p in student.trained().values():
            p.add_(0.2 * torch.randn(p.shape))
    output.mkdir()
    adapter = teacher.adapter(student.lora_weights(), teacher.pipeline.scheduler)
    write_adapter(Export(None, adapter=adapter), output)
    return (output / "pytorch_lora_weights.safetensors").rename(output / "style.safetensors")


@pytest.fixture
def style(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return style_of(tiny_pipeline, tmp_path / "style")


def seen(teacher: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *teacher.shape, generator=generator), torch.tensor([0.3, 0.8])
    if teacher.process.t_range[1] > 1:
        t = 1000 * t
    with torch.no_grad():
        return teacher.denoiser(x, t, teacher.condition(PROMPTS)).output


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_the_teacher_is_diffusers_with_the_lora(
    name: str, tiny_pipeline: Path, tiny_families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_pipeline if name == "sd" else tiny_families(name)
    style = style_of(folder, tmp_path / "style")
    own = {"safety_checker": None} if name == "sd" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **own)
    before = seen(LatentTeacher(pipe, "stock", 16))
    pipe = DiffusionPipeline.from_pretrained(folder, **own)
    pipe.load_lora_weights(style.parent, weight_name=style.name)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    expected = seen(LatentTeacher(pipe, "stock", 16))
    teacher = Teacher.load(TeacherSettings(str(folder), lora=str(style), lora_scale=0.5), 16)
    styled = seen(teacher)
    assert (expected - before).norm() > 1e-2 * before.norm()
    assert torch.allclose(styled, expected, atol=1e-4 * float(expected.abs().max()))
    assert not hasattr(teacher.family.network, "peft_config")


def test_a_student_of_a_styled_teacher(
    tiny_pipeline: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused pipeline, and the card's own lines in a process of plain diffusers, draw what was trained."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tree = {
        "output_dir": str(tmp_path / "run"),
        "teacher": {"path": str(tiny_pipeline), "lora": str(style), "lora_scale": 0.5},
        "student": {"kind": "lora", "rank": 2, "lora_alpha": 6},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "validation_prompts": ["red apple"],
    }
    runner = Runner(load_config(tree))
    runner.train()
    method: Any = runner.method
    with method.student.teacher_mode():
        styled = Teacher.load(TeacherSettings(str(tiny_pipeline), lora=str(style), lora_scale=0.5), 16)
        assert torch.allclose(seen(method.teacher), seen(styled), atol=1e-5)

    with torch.no_grad():
        trained = method.teacher.decode(method.sample(["red apple"], 2, 2.0, seeded(1, 0)))
    ours = (trained / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()[0]
    for folder in ("pipeline", "lora"):
        card = (runner.run / folder / "README.md").read_text()
        assert f"| teacher | {tiny_pipeline.name} with 0.5 x style.safetensors |" in card
        assert str(style.parent) not in card and str(tiny_pipeline.parent) not in card
        code = card.split("```python\n")[1].split("```")[0].replace("seed(0)", "seed(0), output_type='np'")
        code = code.replace('from_pretrained("pipeline", dtype', f'from_pretrained("{tiny_pipeline}", dtype')
        code = code.replace(f'("{folder}")', f'("{runner.run / folder}")')
        code += "import numpy as np\nnp.save('picture.npy', image)\n"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=style.parent, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert np.abs(np.load(style.parent / "picture.npy") - ours).max() < 2e-5


def test_mistakes(tiny_pipeline: Path, tmp_path: Path, tiny_families: Callable[[str], Path]) -> None:
    def load(lora: str, path: str = str(tiny_pipeline)) -> None:
        Teacher.load(TeacherSettings(path, lora=lora))

    with pytest.raises(UserError, match=r"teacher\.lora: no file \./none\.safetensors; give"):
        load("./none.safetensors")
    with pytest.raises(UserError, match=r"teacher\.lora: no file owner/name; give"):
        load("owner/name")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"teacher\.lora: .*cut\.safetensors cannot be added"):
        load(str(tmp_path / "cut.safetensors"))
    with pytest.raises(UserError, match=r"teacher\.lora: .* cannot be added .*; give a LoRA of this network"):
        load(str(style_of(tiny_families("sd3"), tmp_path / "other")))
    with pytest.raises(UserError, match=r"teacher\.lora: fashion-edm works on pixels"):
        load(str(tmp_path / "cut.safetensors"), "fashion-edm")


def lora_of(module: torch.nn.Module, ends: tuple[str, ...], rank: int = 4) -> dict[str, list[torch.Tensor]]:
    """A and B of linear layers by name."""
    found = [(n, m.weight) for n, m in module.named_modules() if n.endswith(ends)]
    return {n: [torch.randn(rank, w.shape[1]), torch.randn(w.shape[0], rank)] for n, w in found}


def kohya(part: str, layers: dict[str, list[torch.Tensor]], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"lora_{part}_{name.replace('.', '_')}.{k}": v.clone()
        for name, (a, b) in layers.items()
        for k, v in {"lora_down.weight": a, "lora_up.weight": b, **more}.items()
    }


@pytest.mark.parametrize(("layout", "alpha"), [("kohya", None), ("kohya", 2.0), ("dora", None)])
def test_weights_by_hand(layout: str, alpha: float | None, tiny_pipeline: Path, tmp_path: Path) -> None:
    """W + scale alpha/rank B A in network and text encoder, alpha = rank where the file has none; of peft's DoRA rows
    of the magnitude's length (arXiv 2402.09353, eq. 5)."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    unet, texts = (
        lora_of(pipe.unet, ("to_q", "to_v")),
        lora_of(pipe.text_encoder, ("q_proj", "out_proj", "fc1")),
    )
    if layout == "dora":
        length, texts = torch.rand(64) + 0.5, {}
        rows = {n: length[: len(b)] for n, (a, b) in unet.items()}
        weights = {f"unet.{n}.lora_A.weight": a for n, (a, _) in unet.items()}
        weights |= {f"unet.{n}.lora_B.weight": b for n, (_, b) in unet.items()}
        weights |= {f"unet.{n}.lora_magnitude_vector": v.clone() for n, v in rows.items()}
    else:
        scale = {} if alpha is None else {"alpha": torch.tensor(alpha)}
        weights = kohya("unet", unet, **scale) | kohya("te_text_model", texts, **scale)
    save_file(weights, tmp_path / "style.safetensors")
    before = {
        id(m): {k: v.clone() for k, v in m.state_dict().items()} for m in (pipe.unet, pipe.text_encoder)
    }
    fuse_lora(pipe, str(tmp_path / "style.safetensors"), 0.5, key="teacher.lora")
    for module, layers in ((pipe.unet, unet), (pipe.text_encoder, texts)):
        for name, (a, b) in layers.items():
            wanted = before[id(module)][f"{name}.weight"] + 0.5 * (alpha or 4) / 4 * b @ a
            if layout == "dora":
                wanted = rows[name][:, None] * wanted / wanted.norm(dim=1, keepdim=True)
            assert torch.allclose(module.get_submodule(name).weight, wanted, atol=1e-5), name


def test_files_that_would_be_used_in_part(
    tiny_pipeline: Path,
    tmp_path: Path,
    tiny_families: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Counted and named, in every way a LoRA comes in; diffusers alone leaves a line in its log."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    unet, texts = lora_of(pipe.unet, ("to_q", "to_v")), lora_of(pipe.text_encoder, ("q_proj", "fc1"))

    def refused(weights: dict[str, torch.Tensor], folder: Path = tiny_pipeline) -> str:
        save_file(weights, tmp_path / "style.safetensors")
        with pytest.raises(UserError) as caught:
            Teacher.load(TeacherSettings(str(folder), lora=str(tmp_path / "style.safetensors")))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("teacher.lora: ")
        return str(caught.value)

    half = {("unet." if i % 2 else "unet.other.") + n: ab for i, (n, ab) in enumerate(unet.items())}
    peft = {f"{n}.lora_{k}.weight": v for n, ab in half.items() for k, v in zip("AB", ab, strict=True)}
    count = len(unet)
    said = (
        f"{count // 2} of {count} layers of {tmp_path}/style.safetensors fit no layer of UNet2DConditionModel"
    )
    assert said in refused(peft) and f"first: {next(iter(half))})" in refused(peft)
    second = kohya("unet", unet) | kohya("te2_text_model", texts)
    assert f"{len(texts)} of {count + len(texts)} layers" in refused(second)
    third = kohya("unet", unet) | kohya("te_text_model", texts)  # not enough of them for diffusers
    assert "(first: text_encoder.encoder.layers.0.self_attn.q_proj)" in refused(third)
    scales = kohya("unet", unet, dora_scale=torch.ones(1))
    assert f"is a DoRA: diffusers would leave out the magnitudes of {count} layers (first: " in refused(
        scales
    )
    save_file(peft, tmp_path / "style.safetensors")
    source = f"{tiny_pipeline}+{tmp_path}/style.safetensors"
    assert main(["evaluate", source, "--data", "emoji-noto", "--num_images", "2", "--steps", "1"]) == 2
    assert said in capsys.readouterr().err


def test_the_dry_run_looks_for_the_file(tiny_pipeline: Path, style: Path) -> None:
    def text(lora: str) -> str:
        tree = {
            "output_dir": "none",
            "teacher": {"path": str(tiny_pipeline), "lora": lora},
            "data": {"name": "emoji-noto", "split": "score"},
            "method": {"name": "lcd", "guidance_dim": 8},
        }
        return describe(load_config(tree))

    assert f"{tiny_pipeline} with 1 x style.safetensors (architecture" in text(str(style))
    assert "owner/name/style.safetensors  unless" in text("owner/name/style.safetensors")
    with pytest.raises(UserError, match=r"teacher\.lora: no file /none"):
        text("/none")
