"""Blueprints of well-known teachers: their published sizes, counted on the meta device, and dry runs on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.cli import main
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.process import VP
from fewstep.distill.errors import UserError
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.planning.known_teachers import blueprint, meta_teacher
from fewstep.distill.planning.plan import count, prompt_size
from fewstep.distill.planning.published_teachers import KNOWN_TEACHERS
from fewstep.distill.settings import TeacherSettings

from .test_dry_run import rows

CONFIGS = Path(__file__).parents[2] / "configs"
VAE, VAE_16, CLIP_L, CLIP_L_P, CLIP_G = 83_653_863, 83_819_683, 123_060_480, 123_650_304, 694_659_840
T5, UMT5 = 4_762_310_656, 5_680_910_336
# Parameters in the order network, autoencoder, text encoders; latents; numbers in a prompt's record.
SIZES: dict[str, tuple[list[int], tuple[int, int, int], int]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ([859_520_964, VAE, CLIP_L], (4, 64, 64), 77 * 768),
    "SimianLuo/LCM_Dreamshaper_v7": ([859_520_964 + 256 * 320, VAE, CLIP_L], (4, 64, 64), 77 * 768),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        [2_567_463_684, VAE, CLIP_L, CLIP_G], (4, 128, 128), 77 * 2048 + 1280,
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        [2_028_328_000, VAE_16, CLIP_L_P, CLIP_G, T5], (16, 128, 128), 333 * 4096 + 2048,
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        [2_243_171_520, VAE_16, CLIP_L_P, CLIP_G, T5], (16, 128, 128), 333 * 4096 + 2048,
    ),
    "black-forest-labs/FLUX.1-dev": ([11_901_408_320, VAE_16, CLIP_L, T5], (16, 128, 128), 512 * 4096 + 768),
    "black-forest-labs/FLUX.1-schnell": ([11_891_178_560, VAE_16, CLIP_L, T5], (16, 128, 128), 256 * 4096 + 768),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ([1_418_996_800, 126_892_531, UMT5], (16, 60, 60), 512 * 4096),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_position_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3's table of positions (no parameter) takes up to 2 GB of real memory; its shape is enough here."""

    def table(dim: int, size: int, **_: Any) -> torch.Tensor:
        return torch.empty(size * size, dim, device="meta")

    monkeypatch.setattr("diffusers.models.embeddings.get_2d_sincos_pos_embed", table)


@pytest.mark.parametrize("path", KNOWN_TEACHERS)
def test_published_sizes(path: str, no_position_tables: None) -> None:
    plan = blueprint(TeacherSettings(path))
    assert plan.origin == "its published configuration" and "scheduler" not in plan.missing
    teacher = meta_teacher(TeacherSettings(path), plan.architecture)
    assert isinstance(teacher, LatentTeacher)
    parts = [teacher.family.network, teacher.vae, *teacher.text_encoders]
    counts, shape, numbers = SIZES[path]
    assert [count(list(m.parameters())) for m in parts] == counts
    assert (teacher.shape, prompt_size(teacher)) == (shape, numbers)
    assert all(p.is_meta for m in parts for p in m.parameters())
    assert isinstance(teacher.process, VP) == (
        any(name in path for name in ("stable-diffusion-v", "xl", "LCM"))
    )
    assert type(teacher.pipeline).__name__ == plan.architecture.kind


def test_the_sdxl_recipe_trains_as_many_parameters_as_the_report_counts() -> None:
    """197 M (arXiv 2311.05556)."""
    config = load_config(read_yaml(CONFIGS / "sdxl" / "lcd_lora.yaml"))
    assert config.teacher is not None
    teacher = meta_teacher(config.teacher, blueprint(config.teacher).architecture, config.resolution)
    with torch.device("meta"):
        student = Student(teacher.denoiser, config.student)
    assert sum(p.numel() for p in student.trained().values()) == 196_751_360


@pytest.mark.slow
def test_the_sdxl_recipe_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(CONFIGS / "sdxl" / "lcd_lora.yaml"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert rows(text, "parameters")["trained"] == "196,751,360"
    memory = rows(text, "memory")
    assert memory["teacher network, float16"] == "4.78"  # 2,567,463,684 * 2 / 2^30
    assert memory["autoencoder, float32"] == "0.312"  # its force_upcast
    low, high = (float(memory["activations, estimate"].split()[i]) for i in (0, 2))
    assert 5 < high < 40 and low == pytest.approx(high / 2, abs=0.01)
    needed = rows(text, "must be downloaded")
    assert needed["stabilityai/stable-diffusion-xl-base-1.0 text_encoder_2"] == "about 2.59 GiB"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dry_runs_of_a_tiny_sdxl(kind: str, tiny_families: Callable[[str], Path]) -> None:
    """From its folder, with the parameters that its own weights have."""
    folder = tiny_families("sdxl")
    tree = {
        "output_dir": "run",
        "teacher": {"path": str(folder)},
        "student": {"kind": kind, **({"rank": 4} if kind == "lora" else {})},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", **({} if kind == "lora" else {"guidance_dim": 8})},
    }
    text = describe(load_config(tree))
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    title = "student" if kind == "full" else "teacher network (UNet2DConditionModel)"
    extra = 8 * 16 if kind == "full" else 0  # the embedding of the guidance scale
    assert rows(text, "parameters")[title] == f"{count(list(unet.parameters())) + extra:,}"
    assert rows(text, "must be downloaded") == {"nothing": ""}
    kept = 2 * 8 * 8 * 8 + 4 * (12 * 40 + 20)
    assert rows(text, "work")["disk for caches"].startswith(f"{kept / 1024:.0f} KiB an image")


REFUSED = {
    "lcd": r"works in straight paths \(rectified flow\); this method needs a variance-preserving teacher",
    "meanflow": r"student: \w+ cannot take a second time; TwoTimeDiT can",
    "ict": r"is a \w+; this method's exported pipeline knows one text encoder and a U-Net",
}


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_methods_that_cannot_take_a_flow_teacher_say_so(
    name: str, method: str, tiny_families: Callable[[str], Path]
) -> None:
    settings = {"ict": {"sigma_min": 0.01, "sigma_max": 50.0, "ode_source": "teacher"}}.get(method, {})
    tree = {
        "output_dir": "run",
        "teacher": {"path": str(tiny_families(name))},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": method, **settings},
        "resolution": 16,
    }
    with pytest.raises(UserError, match=REFUSED[method]):
        describe(load_config(tree))


@pytest.mark.parametrize("method", ["meanflow", "ict"])
def test_methods_with_pipelines_of_their_own_refuse_sdxl(
    method: str, tiny_families: Callable[[str], Path]
) -> None:
    settings = {"ict": {"sigma_min": 0.05, "sigma_max": 10.0}}.get(method, {})
    tree = {
        "output_dir": "run",
        "teacher": {"path": str(tiny_families("sdxl"))},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": method, **settings},
    }
    with pytest.raises(UserError, match="StableDiffusionXLPipeline; this method's exported pipeline knows"):
        describe(load_config(tree))


def test_blueprints_of_folders(tiny_families: Callable[[str], Path], tmp_path: Path) -> None:
    """SD3 may come without its T5; a Wan with two networks is refused before anything is loaded."""
    folder = shutil.copytree(tiny_families("sd3"), tmp_path / "sd3")
    whole = blueprint(TeacherSettings(str(folder)))
    assert whole.architecture.kind == "StableDiffusion3Pipeline" and whole.missing == ()
    assert list(whole.architecture.parts) == [
        "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler",
    ]  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    small = blueprint(TeacherSettings(str(folder))).architecture
    teacher = meta_teacher(TeacherSettings(str(folder)), small, 32)
    assert "text_encoder_3" not in small.parts and teacher.shape == (4, 16, 16)
    folder = shutil.copytree(tiny_families("wan"), tmp_path / "wan")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "expand_timesteps": True}))
    with pytest.raises(UserError, match=r"a time for every token \(Wan 2\.2\)"):
        meta_teacher(TeacherSettings(str(folder)), blueprint(TeacherSettings(str(folder))).architecture)
