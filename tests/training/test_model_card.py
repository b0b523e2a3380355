"""What a card tells others: names instead of places, lines that run, and how the export was checked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import LCMScheduler
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.settings import LCDSettings
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.models.weight_files import component_sizes
from fewstep.distill.planning.known_teachers import blueprint, meta_teacher
from fewstep.distill.planning.plan import Plan
from fewstep.distill.planning.published_teachers import KNOWN_TEACHERS
from fewstep.distill.pretrain.diffusion import Diffusion
from fewstep.distill.pretrain.settings import DiffusionSettings
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Parts
from fewstep.distill.training.export_check import check_export
from fewstep.distill.training.model_card import Made, adapter_card, run_card
from fewstep.distill.training.public_names import public
from fewstep.pipelines.export import Export, write_adapter


def built(teacher: str, kind: str = "lora", **student: Any) -> LCD:
    loaded = Teacher.load(TeacherSettings(teacher))
    assert isinstance(loaded, LatentTeacher)
    rank = {"rank": 2, "lora_alpha": 4} if kind == "lora" else {}
    parts = Parts(loaded, StudentSettings(kind=kind, **rank, **student), ["red cat"])  # type: ignore[arg-type]
    return LCD(LCDSettings(guidance_dim=16, w_min=1, w_max=3, w_export=2), parts)


def config_of(teacher: str, data: str = "emoji-noto") -> Any:
    tree = {
        "output_dir": "none",
        "teacher": {"path": teacher},
        "data": {"name": data},
        "method": {"name": "lcd"},
    }
    return load_config(tree)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("emoji-sd", "emoji-sd"),
        ("owner/name", "owner/name"),
        ("/home/me/secret/model", "model"),
        ("~/model", "model"),
        ("../model", "model"),
        ("runs/secret/pipeline/", "pipeline"),
        ("/data/me/{000..010}.tar", "{000..010}.tar"),
    ],
)
def test_names_for_others(name: str, shown: str) -> None:
    assert public(name) == shown


def test_no_card_names_a_place_of_this_machine(tiny_pipeline: Path, tmp_path: Path) -> None:
    data = tmp_path / "secret" / "faces"
    data.mkdir(parents=True)
    config = config_of(str(tiny_pipeline), str(data))
    export = built(str(tiny_pipeline)).export()
    for card in (adapter_card(config, export, Made(1)), run_card(config, export, Made(1))):
        assert "| data | faces, split train |" in card and f"| teacher | {tiny_pipeline.name} |" in card
        assert str(tiny_pipeline.parent) not in card and "secret" not in card


def test_the_lines_of_an_embedded_teachers_lora_run(tmp_path: Path) -> None:
    """In a process of plain diffusers, from the folder where the LoRA lies."""
    export = built("emoji-sd", export_fused=False).export()
    card = adapter_card(config_of("emoji-sd"), export, Made(1))
    (tmp_path / "lora").mkdir()
    write_adapter(export, tmp_path / "lora", card)
    code = card.split("```python\n")[1].split("```")[0] + "print(image.size)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(32, 32)"


@pytest.mark.parametrize(("kind", "fused"), [("full", True), ("lora", True), ("lora", False)])
def test_an_export_is_compared_with_the_sampler(kind: str, fused: bool, tiny_pipeline: Path) -> None:
    """A LoRA without a pipeline of its own too; a scheduler that cuts x0 is found, and the card says so."""
    method = built(str(tiny_pipeline), kind, export_fused=fused)
    export = method.export()
    assert (export.model is None) == (not fused)
    export.checked = check_export(method, export, ["dog"])
    assert export.checked.startswith(
        "1 step, one sample of the same noise: largest difference to the sampler of"
    )
    assert float(export.checked.split()[-5]) < 1e-5
    card = run_card if fused else adapter_card
    assert f"\nChecked at export: {export.checked}.\n" in card(config_of(str(tiny_pipeline)), export, Made(1))
    scheduler = export.model.scheduler if export.model is not None else export.adapter.scheduler  # type: ignore[union-attr]
    broken = LCMScheduler.from_config(scheduler.config, thresholding=True)
    if export.model is not None:
        export.model.scheduler = broken
    else:
        export.adapter.scheduler = broken  # type: ignore[union-attr]
    with pytest.warns(RuntimeWarning, match="the exported pipeline does not draw what was trained: 1 step"):
        assert check_export(method, export, ["dog"]).startswith("**the exported pipeline does not draw")


def test_an_export_without_a_sampler_says_so(tiny_pipeline: Path) -> None:
    parts = built(str(tiny_pipeline), "full").parts
    method = Diffusion(DiffusionSettings(), parts)
    assert check_export(method, method.export(), []).startswith(
        "not compared with a sampler of training: the calls"
    )
    other = Export(built(str(tiny_pipeline), "full").export().model, sampling={"1": {}})
    assert check_export(method, other, []) == "not compared with a sampler of training"


def test_what_must_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FLUX.1's files are in bfloat16: 11.9 B parameters are 22 GiB, not 44."""
    monkeypatch.setattr("fewstep.distill.planning.known_teachers._snapshot", lambda settings: None)

    def transformer() -> float:
        settings = TeacherSettings("black-forest-labs/FLUX.1-dev")
        plan = blueprint(settings)
        teacher = meta_teacher(settings, plan.architecture)
        config = config_of(settings.path)
        return Plan(config, plan, teacher, None, None, 1024, [], [], {}, None).downloads()["transformer"]  # type: ignore[arg-type]

    assert transformer() / 2**30 == pytest.approx(22.17, abs=0.01)
    halves = {name for name, known in KNOWN_TEACHERS.items() if known.item == 2}
    assert halves == {name for name in KNOWN_TEACHERS if "FLUX" in name or "diffusion-3" in name}


def test_sizes_of_a_repositorys_files() -> None:
    files = {
        "unet/diffusion_pytorch_model.safetensors": 40, "unet/diffusion_pytorch_model.bin": 41,
        "unet/diffusion_pytorch_model.fp16.safetensors": 20, "unet/diffusion_pytorch_model.non_ema.safetensors": 42,
        "text_encoder/model-00001-of-00002.safetensors": 6, "text_encoder/model-00002-of-00002.safetensors": 5,
        "text_encoder/model.fp16-00001-of-00002.safetensors": 3, "text_encoder/model.safetensors.index.json": 1,
        "vae/diffusion_pytorch_model.bin": 7, "model.safetensors": 100,
    }  # fmt: skip
    assert component_sizes(files, None) == {"unet": 40, "text_encoder": 11, "vae": 7}
    assert component_sizes(files, "fp16") == {"unet": 20, "text_encoder": 3, "vae": 7}
