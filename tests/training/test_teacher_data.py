"""`data: {name: teacher}`: latents by the teacher's own sampler, made once, resumed, told apart by what made them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.config.run import DataSettings
from fewstep.distill.diffusion.draws import Draws, mix
from fewstep.distill.errors import UserError
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training.runner import Runner
from fewstep.distill.training.teacher_data import TeacherData, open_data

PROMPTS = ["red cat", "dog", "a face"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield tmp_path / "cache"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["red cat", "", " dog ", "a face"]) + "\n")
    return path


def configured(teacher: Path, prompts: Path, output: Path, **data: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "teacher": {"path": str(teacher)},
        "student": {"kind": "lora", "rank": 2, "lora_alpha": 2},
        "data": {"name": "teacher", "prompts": str(prompts), "num_inference_steps": 3, **data},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
    }


def made(folder: Path, prompts: Path, **data: Any) -> TeacherData:
    teacher = Teacher.load(TeacherSettings(str(folder)), 16)
    settings = DataSettings(name="teacher", prompts=str(prompts), **{"num_inference_steps": 3, **data})
    found = open_data(settings, teacher, 16)
    assert isinstance(found, TeacherData)
    return found


def rows(data: TeacherData, start: int, stop: int) -> torch.Tensor:
    return data.make(start, stop, data.teacher.encode_prompts)


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() < tolerance * other.norm())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_latents_are_those_of_the_stock_pipeline(
    name: str, tiny_pipeline: Path, tiny_families: Callable[[str], Path], prompts: Path
) -> None:
    """Decoded by our teacher they are the pictures that diffusers draws of the same prompts, guided."""
    folder = tiny_pipeline if name == "sd" else tiny_families(name)
    data = made(folder, prompts, guidance_scale=4.0, seed=5)
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None) if name == "sd" else None
    pipe = pipe or DiffusionPipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(mix(5, i)) for i in range(3)]
    out = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="pt",
        **data.teacher.family.call(16),
    )  # fmt: skip
    pictures = out.frames[:, 0] if name == "wan" else out.images
    latents = rows(data, 0, 3)
    scaled = data.teacher.latents(
        torch.cat([latents, torch.full_like(latents, -30)], 1), Draws(0, 0, range(3))
    )
    ours = (data.teacher.decode(scaled) / 2 + 0.5).clamp(0, 1)
    assert pictures.std() > 1e-3 and (pictures[0] - pictures[1]).abs().max() > 1e-3
    assert torch.allclose(ours, pictures, atol=2e-5)


def test_a_row_does_not_depend_on_its_batch(tiny_pipeline: Path, prompts: Path) -> None:
    data = made(tiny_pipeline, prompts)
    assert near(rows(data, 1, 2)[0], rows(data, 0, 3)[1], 1e-5)


def test_an_interrupted_making_goes_on(
    tiny_pipeline: Path, prompts: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first batch, the second run makes the others alone and has what an unbroken run has."""
    tree = configured(tiny_pipeline, prompts, tmp_path / "run", images_per_prompt=2)
    asked: list[int] = []
    make = TeacherData.make

    def until(self: TeacherData, start: int, stop: int, texts: Any) -> torch.Tensor:
        asked.append(start)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return make(self, start, stop, texts)

    monkeypatch.setattr(TeacherData, "make", until)
    with pytest.raises(KeyboardInterrupt):
        Runner(load_config(tree)).train()
    resumed = Runner(load_config(tree))
    resumed.train()
    assert asked == [0, 2, 2, 4]
    latents = resumed.batches.latents[range(6)]
    assert latents.shape == (6, 8, 8, 8) and (latents[:, 4:] == -30).all()
    assert resumed.batches.data.captions == [p for p in PROMPTS for _ in range(2)]
    data = made(tiny_pipeline, prompts, images_per_prompt=2)
    assert near(latents[:, :4], rows(data, 0, 6), 1e-3)  # float16 on disk
    asked.clear()
    again = Runner(load_config(tree | {"output_dir": str(tmp_path / "again"), "seed": 3}))
    again.train()
    assert not asked  # another run of the same data
    assert len(list(own_cache.glob("sampled-*.rows"))) == 1


def test_the_student_takes_no_part(tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    """Latents that are made while an adapter is on the shared network are the teacher's."""
    runner = Runner(load_config(configured(tiny_pipeline, prompts, tmp_path / "run")))
    runner.train()
    data: Any = runner.batches.data
    network = data.teacher.family.network
    assert any(p.any() for k, p in network.named_parameters() if "lora_B" in k)
    expected = rows(made(tiny_pipeline, prompts), 0, 3)
    assert torch.equal(rows(data, 0, 3), expected)
    assert near(runner.batches.latents[range(3)][:, :4], expected, 1e-3)


def test_the_fingerprint_tells_what_made_the_latents(
    tiny_pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    base = made(tiny_pipeline, prompts).fingerprint
    assert made(tiny_pipeline, prompts).fingerprint == base
    others = [
        made(tiny_pipeline, prompts, **change).fingerprint
        for change in (
            {"num_inference_steps": 4},
            {"guidance_scale": 2.0},
            {"seed": 1},
            {"images_per_prompt": 2},
        )
    ]
    changed = shutil.copytree(tiny_pipeline, tmp_path / "changed")
    pipe: Any = DiffusionPipeline.from_pretrained(changed, safety_checker=None)
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(0.1)
    pipe.unet.save_pretrained(changed / "unet")
    others.append(made(changed, prompts).fingerprint)
    prompts.write_text("red cat\n")
    others.append(made(tiny_pipeline, prompts).fingerprint)
    assert len({base, *others}) == len(others) + 1


def test_guidance_is_the_teachers_own_unless_given(
    tiny_pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    assert made(tiny_pipeline, prompts).guidance_scale == 7.5  # StableDiffusionPipeline's default
    folder = shutil.copytree(tiny_pipeline, tmp_path / "own")
    (folder / "sampling.json").write_text('{"default": {"guidance_scale": 3.0}}')
    assert made(folder, prompts).guidance_scale == 3.0
    assert made(folder, prompts, guidance_scale=0).guidance_scale == 0


def test_prompts_of_a_folder(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "deep").mkdir(parents=True)
    (tmp_path / "own" / "b.txt").write_text("dog\ndog\n")
    (tmp_path / "own" / "deep" / "a.txt").write_text("red cat\n")
    (tmp_path / "own" / "b.png").write_bytes(b"")
    assert made(tiny_pipeline, tmp_path / "own").captions == ["dog", "dog", "red cat"]


@pytest.mark.parametrize(
    ("data", "method", "message"),
    [
        (
            {"name": "emoji", "num_inference_steps": 5},
            "lcd",
            r"data\.num_inference_steps: no effect on emoji",
        ),
        ({"name": "teacher"}, "lcd", r"data\.prompts: missing"),
        ({"name": "teacher", "prompts": "nowhere.txt"}, "lcd", r"data\.prompts: no file nowhere\.txt"),
        ({"name": "teacher", "prompts": "empty.txt"}, "lcd", r"data\.prompts: empty\.txt holds no prompts"),
    ],
)
def test_mistakes(
    data: dict[str, Any],
    method: str,
    message: str,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    tree = configured(tiny_pipeline, tmp_path, tmp_path / "run") | {"data": data, "method": {"name": method}}
    for run in (lambda c: Runner(c).train(), describe):
        with pytest.raises(UserError, match=message):
            run(load_config(tree))


def test_a_teacher_of_pixels_takes_no_prompts(prompts: Path) -> None:
    with pytest.raises(UserError, match=r"data\.name: teacher: needs a latent teacher"):
        open_data(DataSettings(name="teacher", prompts=str(prompts)), None, 16)


def test_the_dry_run_counts_the_prompts(tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    text = describe(load_config(configured(tiny_pipeline, prompts, tmp_path / "run", images_per_prompt=2)))
    assert "the teacher's own latents of prompts.txt, 16 px" in text
    assert "4 in 2 steps, 0.7 times each of 6" in text
    kept = 2 * 4 * 8 * 8 + 4 * 12 * 16  # float16 latents, float32 prompts
    assert f"disk for caches  {kept / 1024:.0f} KiB an image" in text
