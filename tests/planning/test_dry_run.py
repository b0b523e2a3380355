"""--dry_run: parameter counts of published models, memory, downloads, and the mistakes that it must report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config, with_overrides
from fewstep.distill.cli import main
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.settings import LCDSettings
from fewstep.distill.models.student import Student
from fewstep.distill.planning import dry_run, plan
from fewstep.distill.planning.dry_run import describe, missing_data
from fewstep.distill.planning.known_teachers import blueprint, meta_teacher
from fewstep.distill.planning.meta_memory import LiveBytes, fused_attention
from fewstep.distill.planning.published_teachers import SD15
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training.contract import Parts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SD = TeacherSettings("stable-diffusion-v1-5/stable-diffusion-v1-5")
Configure = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def configure(tiny_pipeline: Path, tmp_path: Path) -> Configure:
    def build(**keys: object) -> RunConfig:
        tree = {
            "output_dir": str(tmp_path / "run"),
            "teacher": {"path": str(tiny_pipeline)},
            "data": {"name": "emoji-noto", "split": "score"},
            "method": {"name": "lcd", "guidance_dim": 8},
            "train_batch_size": 2,
        }
        return load_config({**tree, **keys})

    return build


def rows(text: str, title: str) -> dict[str, str]:
    """The lines of one section, split at the first run of two blanks."""
    section = next(s for s in text.split("\n\n") if s.startswith(title))
    pairs = (line.strip().partition("  ") for line in section.splitlines()[1:])
    return {name: value.strip() for name, _, value in pairs}


def test_published_parameter_counts_of_stable_diffusion() -> None:
    teacher = meta_teacher(SD, SD15)
    counts = {name: plan.count(list(m.parameters())) for name, m in plan.components(teacher).items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert all(t.is_meta for m in plan.components(teacher).values() for t in plan.tensors_of(m))
    assert float(teacher.process.abar[999]) == pytest.approx(0.00466010, rel=1e-5)
    assert teacher.denoiser.kind == "epsilon"


def test_lora_of_rank_64_has_the_size_of_the_released_lcm_lora() -> None:
    """latent-consistency/lcm-lora-sdv1-5: 134,621,556 bytes in float16, 8 + 116,544 of them header, 278 alphas.

    The report (arXiv 2311.05556) rounds it to 67.5 M.
    """
    released = (134_621_556 - 8 - 116_544) // 2 - 278
    config = load_config(read_yaml(CONFIGS / "sd15" / "lcd_lora.yaml"))
    with torch.device("meta"):
        student = Student(meta_teacher(SD, SD15).denoiser, config.student)
    trained = student.trained()
    assert sum(p.numel() for p in trained.values()) == released
    assert len(trained) == 2 * 278
    assert released == pytest.approx(67.5e6, rel=5e-3)


@pytest.mark.parametrize(("name", "trained"), [("lcd", 859_602_884), ("lcd_lora", 67_252_224)])
def test_sd15_recipes_pass(name: str, trained: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A full student has one layer more than its teacher: 256 x 320 weights for the guidance embedding."""
    assert main(["distill", str(CONFIGS / "sd15" / f"{name}.yaml"), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert rows(text, "parameters")["trained"] == f"{trained:,}"
    memory = rows(text, "memory")
    assert memory["teacher network, float16"] == "1.60"  # 859,520,964 * 2 / 2^30
    assert memory["the optimiser's two moments"] == dry_run.gib(8 * trained)
    assert ("moving targets and other state of the method" in memory) == (name == "lcd")
    low, high = (float(memory["activations, estimate"].split()[i]) for i in (0, 2))
    assert 0.5 < high < 20 and low == pytest.approx(high / 2, abs=0.01)
    needed = rows(text, "must be downloaded")
    assert needed[f"{SD.path} unet"] == "about 3.20 GiB"
    assert needed[f"{SD.path} vae"] == "about 0.312 GiB"
    assert needed[f"{SD.path} text_encoder"] == "about 0.458 GiB"
    assert needed["shards/cc12m/{00000..00019}.tar"].startswith("20 of 20 shards")


@pytest.mark.parametrize("name", ["lcd", "lcd_lora"])
def test_emoji_recipes_pass_with_the_embedded_teacher(
    name: str, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.blueprint.__globals__["EMBEDDED"], "emoji-sd", tiny_pipeline)
    text = describe(load_config(read_yaml(CONFIGS / "emoji" / f"{name}.yaml")))
    assert rows(text, "must be downloaded") == {"nothing": ""}
    assert "memory per device" in text


def test_missing_embedded_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.blueprint.__globals__["EMBEDDED"], "emoji-sd", tmp_path / "none")
    with pytest.raises(
        UserError, match=r"teacher\.path: the embedded emoji-sd .*fewstep train-teacher configs/"
    ):
        describe(load_config(read_yaml(CONFIGS / "emoji" / "lcd.yaml")))


def test_memory_of_the_states_is_that_of_the_real_networks(configure: Configure, tiny_pipeline: Path) -> None:
    """Against a method that was really built: teacher, student, gradients, moments, target, average."""
    from fewstep.distill.models.teacher import Teacher

    config = configure(use_ema=True)
    teacher = Teacher.load(TeacherSettings(str(tiny_pipeline)))
    method = LCD(LCDSettings(guidance_dim=8), Parts(teacher, config.student, []))
    parameters = sum(p.numel() for p in method.student.network.parameters())
    frozen = sum(p.numel() for m in teacher.modules() for p in m.parameters())
    memory = rows(describe(config), "memory")
    wanted = (frozen + parameters * (1 + 1 + 2 + 1 + 1)) * 4 / 2**30
    assert float(memory["sum"]) == pytest.approx(wanted, rel=0.02)
    assert memory["trained weights, float32"] == memory["average of the trained weights (use_ema)"]


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(configure: Configure) -> None:
    def activations(**keys: object) -> float:
        return float(rows(describe(configure(**keys)), "memory")["activations, estimate"])

    one, four = activations(train_batch_size=8), activations(train_batch_size=32)
    assert 3.5 < four / one < 4.05
    assert activations(train_batch_size=32, gradient_checkpointing=True) < 0.8 * four


def test_live_bytes_of_known_operations() -> None:
    """y = exp(x) keeps y for its gradient; the peak is y, the sum, its gradient 1 (expanded in place) and x.grad."""
    x = torch.empty(1000, device="meta", requires_grad=True)
    with LiveBytes([x]) as counter:
        y = x.exp()
        z = y + 1
        assert counter.live == 8000
        total = z.sum()
        del z
        assert counter.live == 4004
        torch.autograd.backward(total)
        del y, total
    assert counter.live == 4000  # x.grad
    assert counter.peak == 4000 + 4 + 4 + 4000


def test_attention_is_counted_without_its_score_matrix() -> None:
    q = torch.empty(1, 2, 512, 16, device="meta", requires_grad=True)
    with LiveBytes([q]) as counter, fused_attention():
        torch.autograd.backward(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum())
    assert q.grad is not None and q.grad.shape == q.shape
    assert counter.peak < 4 * 2 * 512 * 512


def test_batch_and_images(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    work = rows(
        describe(configure(train_batch_size=4, gradient_accumulation_steps=5, max_train_steps=7)), "work"
    )
    assert work["global batch"] == "60 = 4 x 5 accumulated x 3 processes"
    assert work["images seen"].startswith("420 in 7 steps")
    assert work["disk for caches"].startswith(f"{(8 * 8 * 8 * 2 + 12 * 16 * 4) / 1024:.0f} KiB an image")


def test_unknown_hub_id_without_a_network(configure: Configure) -> None:
    with pytest.raises(
        UserError, match=r"teacher\.path: nobody/nothing is not in the local cache .* network"
    ):
        describe(configure(teacher={"path": "nobody/nothing"}))


def edit(folder: Path, file: str, **keys: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"_class_name": "DDPMPipeline"}, "is a DDPMPipeline"),
        ({"scheduler": [None, None]}, "has no scheduler"),
        ({"unet": ["diffusers", "UNetOfTheFuture"]}, "no UNetOfTheFuture; install a newer one"),
    ],
)
def test_teacher_folders_that_do_not_fit(
    keys: dict[str, object], message: str, tiny_pipeline: Path, tmp_path: Path, configure: Configure
) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    edit(folder, "model_index.json", **keys)
    with pytest.raises(UserError, match=message):
        describe(configure(teacher={"path": str(folder)}))


def test_teacher_folder_without_its_weights_or_with_a_broken_file(
    tiny_pipeline: Path, tmp_path: Path, configure: Configure
) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert blueprint(TeacherSettings(str(folder))).missing == ("vae",)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"unet/config\.json cannot be read"):
        describe(configure(teacher={"path": str(folder)}))


def test_settings_that_do_not_fit_the_teacher_are_refused(configure: Configure) -> None:
    with pytest.raises(UserError, match=r"method\.num_ddim_timesteps: 7 does not divide"):
        describe(configure(method={"name": "lcd", "num_ddim_timesteps": 7}))


def test_missing_data(tmp_path: Path) -> None:
    (tmp_path / "00.tar").touch()
    assert missing_data("emoji") == [] == missing_data(str(tmp_path))
    assert missing_data(f"{tmp_path}/*.tar") == []
    assert missing_data(f"{tmp_path}/{{00..03}}.tar") == ["3 of 4 shards or patterns match no file"]
    assert "hub" in missing_data("someone/pictures")[0]
    with pytest.raises(UserError, match=r"data\.name: no folder"):
        missing_data("./pictures")


def test_overrides_reach_the_description(tiny_pipeline: Path) -> None:
    tree = with_overrides(
        read_yaml(CONFIGS / "emoji" / "lcd.yaml"),
        ["--teacher.path", str(tiny_pipeline), "--student.kind", "lora"],
    )
    assert "LoRA of rank 64, alpha 64" in describe(load_config(tree))
