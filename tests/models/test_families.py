"""Teachers of each latent pipeline class against the stock pipeline's own calls, recorded while it samples."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.process import VP, RectifiedFlow
from fewstep.distill.errors import UserError
from fewstep.distill.models.network_adapters import FluxDenoiser, WanDenoiser
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.pipeline_source import PipelineSource
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.card_code import sampling_line
from fewstep.pipelines.export import Export
from torch import Tensor

from ..tiny_families import BUILDERS, SIDE, flux_network, wan_network

FLOWS = ("sd3", "flux", "wan")
PROMPT = "red cat"
CALLS: dict[str, dict[str, Any]] = {
    "sdxl": {"guidance_scale": 3.0, "height": SIDE, "width": SIDE},
    "sd3": {"guidance_scale": 3.0, "height": SIDE, "width": SIDE},
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": "", "height": SIDE, "width": SIDE},
    "wan": {"guidance_scale": 3.0, "height": SIDE, "width": SIDE, "num_frames": 1},
}
Families = Callable[[str], Path]


def load(folder: Path, resolution: int | None = SIDE) -> LatentTeacher:
    teacher = Teacher.load(TeacherSettings(str(folder)), resolution)
    assert isinstance(teacher, LatentTeacher)
    return teacher


def recorded(folder: Path, **call: Any) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Any]:
    """State, time and output of every network call of a stock pipeline's two steps, and its latents."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: Any, args: tuple, kwargs: dict, output: tuple) -> None:
        state = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append((state, time, output[0]))

    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    network.register_forward_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    latents = pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="latent", **call)
    return seen, latents[0]


def spread(name: str, x: Tensor) -> Tensor:
    """Tokens of Flux as states (B, C, h, w), frames of Wan as pictures."""
    if name == "flux":
        return FluxPipeline._unpack_latents(x, SIDE, SIDE, 2)
    return x[:, :, 0] if name == "wan" else x


@pytest.mark.parametrize("name", BUILDERS)
def test_a_teacher_gives_what_the_stock_pipelines_network_gives(name: str, tiny_families: Families) -> None:
    """At both steps, with the prompt and with what the pipeline takes for none."""
    folder = tiny_families(name)
    teacher, (seen, _) = load(folder), recorded(folder, **CALLS[name])
    condition = teacher.condition([PROMPT])
    assert len(seen) == (2 if name in ("sdxl", "sd3") else 4)
    outputs = []
    for i, (state, time, output) in enumerate(seen):
        t = torch.atleast_1d(time).double() / (1 if name in ("sdxl", "flux") else 1000)
        x, wanted = spread(name, state), spread(name, output)
        both = Condition.cat([condition.null(), condition])
        told = both if len(x) == 2 else condition.null() if i % 2 else condition
        ours = teacher.denoiser(x, t.expand(len(x)), told)
        assert torch.allclose(ours.output, wanted, atol=1e-5), (i, (ours.output - wanted).abs().max())
        outputs += list(wanted)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4  # with and without the prompt
    assert isinstance(teacher.process, VP if name == "sdxl" else RectifiedFlow)
    assert teacher.denoiser.kind == ("epsilon" if name == "sdxl" else "velocity")


@pytest.mark.parametrize("name", FLOWS)
def test_the_velocity_steps_as_the_stock_scheduler_does(name: str, tiny_families: Families) -> None:
    """x - (t - s) dx/dt from the stock pipeline's first state to its second."""
    folder = tiny_families(name)
    call = CALLS[name] | ({"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0})
    teacher, (seen, _) = load(folder), recorded(folder, **call)
    (x, time, _), (after, later, _) = seen
    t, s = (v.double() / (1 if name == "flux" else 1000) for v in (time, later))
    velocity = teacher.denoiser(spread(name, x), t, teacher.condition([PROMPT])).velocity
    assert t.item() - s.item() > 0.1
    assert torch.allclose(spread(name, x) - (t - s).item() * velocity, spread(name, after), atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_latents_are_decoded_as_the_stock_pipeline_does(name: str, tiny_families: Families) -> None:
    folder = tiny_families(name)
    call = CALLS[name] | {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(3)}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = np.asarray(pipeline(PROMPT, output_type="np", **call)[0]).reshape(1, SIDE, SIDE, 3)
    call["generator"] = torch.Generator().manual_seed(3)
    latents = spread(name, pipeline(PROMPT, output_type="latent", **call)[0])
    with torch.no_grad():
        ours = (load(folder).decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert latents.shape[1:] == load(folder).shape and picture.std() > 1e-3
    assert np.abs(ours - picture).max() < 1e-5


UNITS = {
    "sdxl": lambda z: 0.13025 * z,
    "sd3": lambda z: 1.5305 * (z - 0.0609),
    "flux": lambda z: 0.3611 * (z - 0.1159),
    "wan": lambda z: (
        (z - torch.tensor([-0.5, 0.1, 0.3, 0.9]).view(4, 1, 1))
        / torch.tensor([2.0, 1.5, 0.7, 1.1]).view(4, 1, 1)
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_latents_are_in_the_units_of_the_network(name: str, tiny_families: Families) -> None:
    teacher = load(tiny_families(name))
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        posterior = teacher.posterior(images)
        frames = images.unsqueeze(2) if name == "wan" else images
        mean = teacher.vae.encode(frames).latent_dist.mean.reshape(2, *teacher.shape)
    assert posterior.shape == (2, 8, *teacher.shape[1:])
    assert torch.allclose(posterior[:, :4], mean)
    sharp = torch.cat([mean, torch.full_like(mean, -80.0)], dim=1)
    latents = teacher.latents(sharp, Draws(0, 0, range(2), torch.device("cpu")))
    assert torch.allclose(latents, UNITS[name](mean), atol=1e-6)
    assert torch.allclose(teacher.unscaled(latents), mean, atol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_shapes_of_a_prompt_are_known_without_encoding(name: str, tiny_families: Families) -> None:
    teacher = load(tiny_families(name))
    texts = teacher.encode_prompts([PROMPT, "dog"])
    assert {k: tuple(v.shape[1:]) for k, v in texts.items()} == teacher.family.shapes()
    assert not torch.equal(*texts["encoder_hidden_states"])
    told = teacher.condition([PROMPT, "dog"])
    assert len(told) == len(told.null()) == 2 and set(told.empty) == set(texts)


def test_sdxl_without_a_prompt(tiny_families: Families, tmp_path: Path) -> None:
    """Zeros where the pipeline forces them, else the empty text; sizes stay."""
    folder = shutil.copytree(tiny_families("sdxl"), tmp_path / "sdxl")
    told = load(folder, 32).condition([PROMPT])
    assert not any(v.any() for k, v in told.null().arguments.items() if k != "time_ids")
    assert told.null().arguments["time_ids"].tolist() == [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    teacher = load(folder)
    null, encoded = teacher.condition([PROMPT]).null().arguments, teacher.encode_prompts([""])
    assert all(torch.equal(null[k], v) and v.any() for k, v in encoded.items())
    seen, _ = recorded(folder, negative_prompt="", **CALLS["sdxl"])
    state, time, output = seen[0]
    ours = teacher.denoiser(state[:1], time.double().view(1), teacher.condition([PROMPT]).null()).output
    assert torch.allclose(ours, output[:1], atol=1e-5)


def test_sd3_without_its_t5(tiny_families: Families, tmp_path: Path) -> None:
    """Zeros stand where its states would."""
    folder = shutil.copytree(tiny_families("sd3"), tmp_path / "sd3")
    index = folder / "model_index.json"
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **without}))
    teacher = load(folder)
    states = teacher.encode_prompts([PROMPT])["encoder_hidden_states"]
    assert len(teacher.text_encoders) == 2 and states.shape == (1, 12 + 256, 32)
    assert states[:, :12].any() and not states[:, 12:].any()
    assert teacher.assembled(teacher.family.network).text_encoder_3 is None


def test_the_guidance_that_flux_is_told(tiny_families: Families) -> None:
    folder = tiny_families("flux")
    call = {**CALLS["flux"], "true_cfg_scale": 1.0, "guidance_scale": 7.0}
    teacher, (seen, _) = load(folder), recorded(folder, **call)
    told = teacher.condition([PROMPT])
    assert told.arguments["guidance"].tolist() == told.null().arguments["guidance"].tolist() == [3.5]
    state, time, output = seen[0]
    x, wanted = spread("flux", state), spread("flux", output)
    own = teacher.denoiser(x, time.double(), told).output
    ours = teacher.denoiser(x, time.double(), told.with_(guidance=torch.tensor([7.0]))).output
    assert torch.allclose(ours, wanted, atol=1e-5) and not torch.allclose(own, wanted, atol=1e-3)


def test_a_flux_without_guidance_has_shorter_prompts() -> None:
    """FLUX.1-schnell's model card: 256 tokens."""

    class Schnell:
        transformer = flux_network(guidance_embeds=False)

    from fewstep.distill.models.families.flows import Flux

    family = Flux(Schnell())
    assert family.fixed(2, SIDE) == {} and family.tokens == 256


def test_flux_packs_as_its_pipeline_does() -> None:
    """Also states that are not square, whose positions differ along both sides."""
    network = flux_network(guidance_embeds=False)
    texts = {"encoder_hidden_states": torch.randn(2, 3, 32), "pooled_projections": torch.randn(2, 16)}
    x, t = torch.randn(2, 4, 4, 8), torch.tensor([0.2, 0.7], dtype=torch.float64)
    with torch.no_grad():
        ours = FluxDenoiser(network, RectifiedFlow(), "velocity")(x, t, Condition(texts, {})).output
        tokens = network(
            hidden_states=FluxPipeline._pack_latents(x, 2, 4, 4, 8),
            timestep=t.float(),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 4, x.device, x.dtype),
            txt_ids=torch.zeros(3, 3),
            **texts,
        ).sample
    assert torch.allclose(ours, FluxPipeline._unpack_latents(tokens, 4, 8, 1), atol=1e-6)


def test_wan_takes_pictures_and_videos() -> None:
    denoiser = WanDenoiser(wan_network(), RectifiedFlow(), "velocity")
    told = Condition({"encoder_hidden_states": torch.randn(2, 3, 32)}, {})
    video, t = torch.randn(2, 4, 3, 4, 6), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        seen = denoiser(video, t, told).output
        assert seen.shape == video.shape and not torch.allclose(seen[:, :, 0], seen[:, :, 1], atol=1e-3)
        first = denoiser(video[:, :, 0], t, told).output
        assert torch.equal(first, denoiser(video[:, :, :1], t, told).output[:, :, 0])
    with pytest.raises(ValueError, match="a WanTransformer3DModel has one time"):
        denoiser(video, t, told, r=t / 2)


CALL_ARGUMENTS = {
    "sdxl": {},
    "sd3": {},
    "flux": {"height": SIDE, "width": SIDE, "max_sequence_length": 512},
    "wan": {"height": SIDE, "width": SIDE, "num_frames": 1},
}


@pytest.mark.parametrize("name", BUILDERS)
def test_resolutions(name: str, tiny_families: Families) -> None:
    """A teacher works where it is asked to; its pipeline's call then says so."""
    folder, unit = tiny_families(name), {"sdxl": 2, "sd3": 4, "flux": 4, "wan": 8}[name]
    teacher = load(folder)
    assert teacher.call() == CALL_ARGUMENTS[name]
    larger = load(folder, 2 * SIDE)
    assert larger.shape == (4, *(2 * side for side in teacher.shape[1:]))
    assert larger.call() == CALL_ARGUMENTS[name] | {"height": 2 * SIDE, "width": 2 * SIDE}
    assert load(folder, None).resolution == {"flux": 256, "wan": 480}.get(name, SIDE)
    with pytest.raises(UserError, match=f"resolution: {SIDE + 1} is no multiple of {unit}"):
        load(folder, SIDE + 1)


def test_precision_of_the_frozen_parts(tiny_families: Families) -> None:
    """Autoencoders that overflow, norms and time embedding of Wan, and in float16 the T5's wo stay in float32."""

    def dtypes(module: Any, part: str = "") -> set[torch.dtype]:
        return {p.dtype for name, p in module.named_parameters() if part in name}

    cpu, whole, half, brain = torch.device("cpu"), torch.float32, torch.float16, torch.bfloat16
    sdxl = load(tiny_families("sdxl"))
    sdxl.to(cpu, half)
    assert (dtypes(sdxl.vae), dtypes(sdxl.pipeline.unet)) == ({whole}, {half})
    wan = load(tiny_families("wan"))
    for dtype, wo in ((brain, brain), (half, whole)):
        wan.to(cpu, dtype)
        parts, network = wan.pipeline, wan.pipeline.transformer
        assert dtypes(wan.vae) == dtypes(network, "time_embedder") == dtypes(network, "norm2") == {whole}
        assert dtypes(network, "ffn") == dtypes(network, "norm_q") == {dtype} == {network.dtype}
        assert (dtypes(parts.text_encoder, ".wo.") == {wo}) and dtypes(parts.text_encoder, ".q.") == {dtype}
    wan.to(cpu, brain)
    x = torch.randn(1, *wan.shape)
    low = wan.denoiser(x, torch.tensor([0.4]), wan.condition([PROMPT])).output
    exact = load(tiny_families("wan"))
    wanted = exact.denoiser(x, torch.tensor([0.4]), exact.condition([PROMPT])).output
    assert low.dtype == whole and 0 < (low - wanted).norm() / wanted.norm() < 0.05


def test_a_lora_stays_in_float32_on_a_half_precision_teacher(tiny_families: Families) -> None:
    teacher = load(tiny_families("flux"))
    student = Student(teacher.denoiser, StudentSettings(kind="lora", rank=2))
    teacher.to(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in student.trained().values()} == {torch.float32}
    assert teacher.family.network.x_embedder.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BUILDERS)
def test_a_half_precision_network_takes_float32_texts(name: str, tiny_families: Families) -> None:
    """Flux rounds 1,000 times its guidance too."""
    teacher = load(tiny_families(name))
    x, t, told = torch.randn(1, *teacher.shape), torch.tensor([0.5]), teacher.condition([PROMPT])
    with torch.no_grad():
        wanted = teacher.denoiser(x, t, told).output
        teacher.family.network.to(torch.bfloat16)
        low = teacher.denoiser(x, t, told).output
    assert low.dtype == torch.float32 and 0 < (low - wanted).norm() / wanted.norm() < 0.1


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_teacher_is_refused_where_variance_must_be_preserved(
    name: str, tiny_families: Families
) -> None:
    with pytest.raises(UserError, match=r"teacher\.path: .* works in straight paths .* variance-preserving"):
        _ = load(tiny_families(name)).noise


def test_teachers_without_an_adapter(tiny_families: Families, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_families("wan"), tmp_path / "wan")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": 0.9}))
    with pytest.raises(UserError, match=r"WanPipeline with two networks .*Wan 2\.1"):
        load(folder)
    other = DiffusionPipeline.from_pretrained(tiny_families("sdxl")).components
    from diffusers import StableDiffusionXLImg2ImgPipeline

    with pytest.raises(
        UserError, match=r"StableDiffusionXLImg2ImgPipeline; teachers so far are .*FluxPipeline"
    ):
        LatentTeacher(StableDiffusionXLImg2ImgPipeline(**other), "folder")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipeline_with_another_network(name: str, tiny_families: Families, tmp_path: Path) -> None:
    """Saved and opened by plain diffusers: the network is the new one, the rest and the settings are the teacher's."""
    teacher = load(tiny_families(name))
    teacher.pipeline.register_to_config(**({"force_zeros_for_empty_prompt": False} if name == "sdxl" else {}))
    network = type(teacher.family.network).from_config(teacher.family.network.config)
    teacher.assembled(network).save_pretrained(tmp_path / name)
    opened = DiffusionPipeline.from_pretrained(tmp_path / name)
    assert type(opened) is type(teacher.pipeline)
    found = getattr(opened, teacher.family.component).state_dict()
    assert all(torch.equal(v, found[k]) for k, v in network.state_dict().items())
    assert all(torch.equal(v, opened.vae.state_dict()[k]) for k, v in teacher.vae.state_dict().items())
    if name == "sdxl":
        assert opened.config.force_zeros_for_empty_prompt is False


def test_the_pictures_of_a_video_pipeline_are_scored(tiny_families: Families) -> None:
    """Videos of one frame; longer ones are refused."""
    folder = tiny_families("wan")
    source = PipelineSource(str(folder), torch.device("cpu"))
    call = {**load(folder).call(), "num_inference_steps": 1, "guidance_scale": 1.0}
    pictures, _ = source.pictures(range(2), Inputs.of_captions([PROMPT, "dog"]), 0, call)
    assert pictures.shape == (2, 3, SIDE, SIDE) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures[0], pictures[1]) and source.evaluations() == 2
    with pytest.raises(UserError, match="WanPipeline gives neither RGB nor grey pictures"):
        source.pictures(range(2), Inputs.of_captions([PROMPT]), 0, {**call, "num_frames": 5})


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_line_of_the_card_draws_a_picture(name: str, tiny_families: Families) -> None:
    teacher = load(tiny_families(name))
    call = {**teacher.call(), "num_inference_steps": 1}
    line = sampling_line(Export(teacher.pipeline, sampling={"1": call}))
    found: dict[str, Any] = {"pipe": DiffusionPipeline.from_pretrained(tiny_families(name)), "torch": torch}
    exec(line, found)
    assert np.asarray(found["image"]).shape == (SIDE, SIDE, 3)
