"""Teachers whose parts do not fit are refused where they are loaded, in one line; odd ones that do fit are used."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.lcd import LCD
from fewstep.distill.methods.latent_consistency.settings import LCDSettings
from fewstep.distill.models.teacher import LatentTeacher, Teacher, locate
from fewstep.distill.planning.known_teachers import blueprint
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Parts

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def stock(tiny_pipeline: Path, tiny_families: Callable[[str], Path]) -> Callable[..., Any]:
    """A pipeline with parts of another configuration."""
    opened: dict[str, Any] = {}

    def build(name: str = "sd", **parts: dict[str, Any]) -> Any:
        if name not in opened:
            folder = tiny_pipeline if name == "sd" else tiny_families(name)
            opened[name] = DiffusionPipeline.from_pretrained(
                folder, **({"safety_checker": None} if name == "sd" else {})
            )
        own = dict(opened[name].components)
        for part, changes in parts.items():
            kept = {k: v for k, v in own[part].config.items() if k != "_use_default_values"}
            own[part] = type(own[part]).from_config({**kept, **changes})
        own = {
            k: v for k, v in own.items() if k not in ("image_encoder", "feature_extractor", "transformer_2")
        }
        return type(opened[name])(**own, **({"feature_extractor": None} if name == "sd" else {}))

    return build


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [
        ("sd", {"unet": {"in_channels": 9}}, r"takes 9 channels, its autoencoder's latents have 4 .*inpainting"),
        ("sd", {"unet": {"out_channels": 8}}, r"gives 8 channels for latents of 4 \(a learned variance"),
        ("sd", {"unet": {"num_class_embeds": 10}}, r"has num_class_embeds 10; give"),
        ("sd", {"unet": {"cross_attention_dim": 24}}, r"cross_attention_dim is 24, its text encoders give 16; save"),
        ("sd", {"unet": {"sample_size": [8, 12]}}, r"network's sample_size is \[8, 12\]; .* square"),
        ("sd", {"vae": {"latent_channels": 8}}, r"takes 4 channels, its autoencoder's latents have 8"),
        ("sdxl", {"unet": {"addition_time_embed_dim": 16}}, r"_embeddings_input_dim is 68, its text encoders give 116"),
        ("sd3", {"transformer": {"joint_attention_dim": 48}}, r"joint_attention_dim is 48, its text encoders give 32"),
        ("sd3", {"transformer": {"pooled_projection_dim": 40}}, r"pooled_projection_dim is 40, .* give 36"),
        ("flux", {"transformer": {"in_channels": 32}}, r"takes 8 channels, its autoencoder's latents have 4"),
        ("flux", {"transformer": {"pooled_projection_dim": 24}}, r"pooled_projection_dim is 24, .* give 16"),
        ("wan", {"transformer": {"in_channels": 9}}, r"takes 9 channels"),
        ("wan", {"transformer": {"text_dim": 16}}, r"text_dim is 16, its text encoders give 32"),
    ],
)  # fmt: skip
def test_refused_by_their_configurations(
    name: str, parts: dict[str, Any], said: str, stock: Callable[..., Any]
) -> None:
    LatentTeacher(stock(name), "fits", 16)
    with pytest.raises(UserError, match=rf"^teacher\.path: odd.*{said}[^\n]*$"):
        LatentTeacher(stock(name, **parts), "odd", 16)


def test_tokenizers_and_encoders_that_are_not_there(stock: Callable[..., Any]) -> None:
    pipe = stock()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.model_max_length = int(1e30)
    with pytest.raises(
        UserError, match=r"tokenizer has model_max_length none, its text_encoder 12 places; set it to 12"
    ):
        LatentTeacher(pipe, "odd")
    pipe = stock("sdxl")
    pipe.text_encoder = None
    with pytest.raises(UserError, match=r"^teacher\.path: odd has no text_encoder; save"):
        LatentTeacher(pipe, "odd")


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (
            DDIMScheduler(**SD, rescale_betas_zero_snr=True),
            r"ends in pure noise .*epsilon; give a v_prediction teacher",
        ),
        (
            UniPCMultistepScheduler(**SD, prediction_type="flow_prediction", use_flow_sigmas=True),
            r"prediction_type flow_prediction with use_flow_sigmas; .* one of epsilon, v_prediction, sample",
        ),
        (EulerDiscreteScheduler(**SD), None),
        (DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"), None),
    ],
)
def test_schedulers(scheduler: Any, said: str | None, stock: Callable[..., Any]) -> None:
    pipe = stock()
    pipe.scheduler = scheduler
    if said is None:
        assert LatentTeacher(pipe, "fits").noise.log_snr(torch.tensor([999.0])).isfinite().all()
        return
    with pytest.raises(UserError, match=rf"^teacher: its scheduler .*{said}[^\n]*$"):
        LatentTeacher(pipe, "odd")


def test_a_transformer_with_a_scheduler_of_betas(stock: Callable[..., Any]) -> None:
    pipe = stock("sd3")
    pipe.scheduler = DDIMScheduler(**SD)
    with pytest.raises(
        UserError, match=r"prediction_type epsilon and 1000 training steps; a StableDiffusion3Pipeline"
    ):
        LatentTeacher(pipe, "odd", 16)


@pytest.mark.parametrize(
    ("size", "resolution", "wanted"), [([8, 8], None, 16), (None, 24, 24), (None, None, 16), ([8, 8], 24, 24)]
)
def test_the_side_of_a_network(
    size: Any, resolution: int | None, wanted: int, stock: Callable[..., Any]
) -> None:
    """Of a square list, of the resolution asked for, of the autoencoder's pictures; an export has the number."""
    teacher = LatentTeacher(stock(unet={"sample_size": size}), "odd", resolution)
    assert teacher.resolution == wanted and teacher.shape == (4, wanted // 2, wanted // 2)
    own = teacher.family.network.config.sample_size
    assert own == (8 if size else wanted // 2)
    assert teacher.call() == ({} if own == wanted // 2 else {"height": wanted, "width": wanted})


def test_a_network_that_is_told_the_guidance_scale(stock: Callable[..., Any]) -> None:
    """As its pipeline's call tells it by default; LCD's own embedding must be of that width."""
    pipe = stock(unet={"time_cond_proj_dim": 32})
    with torch.no_grad():
        pipe.unet.time_embedding.cond_proj.weight.normal_()
    pipe.set_progress_bar_config(disable=True)
    seen: list[Any] = []
    hook = pipe.unet.register_forward_hook(lambda m, a, kw, out: seen.append((a, out[0])), with_kwargs=True)
    pipe("red cat", num_inference_steps=1, output_type="latent")
    hook.remove()
    teacher = LatentTeacher(pipe, "told")
    ((state, time), output) = seen[0]
    ours = teacher.denoiser(state, time.double().view(1), teacher.condition(["red cat"])).output
    assert torch.allclose(ours, output, atol=1e-5)
    assert teacher.family.unguided() == {"guidance_scale": 7.5}
    parts = Parts(teacher, StudentSettings(), [])
    with pytest.raises(
        UserError, match=r"method\.guidance_dim: 256, but .* scale in 32 numbers; set it to 32"
    ):
        LCD(LCDSettings(), parts)
    assert LCD(LCDSettings(guidance_dim=32), parts).student.network.config.time_cond_proj_dim == 32


def test_folders_of_one_variant(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher is asked for by its variant, in a dry run too; what is scored or sampled is opened as it is."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "half"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None, dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    for opened in (Teacher.load, blueprint):
        with pytest.raises(
            UserError, match=r"weights of the variant fp16 alone; add --teacher\.variant fp16$"
        ):
            opened(TeacherSettings(str(folder)))
        opened(TeacherSettings(str(folder), variant="fp16"))
    sample = [
        "sample",
        str(folder),
        "--data",
        "emoji",
        "--num_images",
        "2",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(sample) == 0 and len(list((tmp_path / "out").glob("*.png"))) == 2
    both = shutil.copytree(folder, tmp_path / "both")
    pipe.save_pretrained(both)
    assert blueprint(TeacherSettings(str(both))).missing == ()


def test_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a name that could be a hub id, and where nothing is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").write_bytes(b"")
    for path in (
        "models/model.safetensors",
        "models/none.ckpt",
        str(tmp_path / "models" / "model.safetensors"),
    ):
        with pytest.raises(
            UserError, match=rf"^teacher\.path: {path}: single files are not supported; convert it"
        ):
            locate(path)
