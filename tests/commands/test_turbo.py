"""`fewstep turbo`: one command from prompts to a LoRA, its settings by family, and its refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler
from fewstep.distill.cli import main
from fewstep.distill.commands import turbo
from fewstep.distill.errors import UserError
from fewstep.distill.planning import budget
from fewstep.distill.planning.budget import Measured, advice, disk_needs, full_disks, rehearse
from fewstep.distill.planning.plan import planned
from fewstep.distill.training.runner import Runner
from fewstep.distill.training.teacher_data import TeacherData

from ..models.test_teacher_lora import style_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = ["--student.rank", "2", "--max_train_steps", "2", "--data.num_inference_steps", "3"]
TINY += ["--data.images_per_prompt", "2", "--validation_steps", "0", "--train_batch_size", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red cat\ndog\n\na face\n")
    return tmp_path


def configured(model: Path, *flags: str, method: str | None = None) -> Any:
    return turbo.configured(str(model), None, "prompts.txt", method, None, [*TINY, *flags])


def test_from_prompts_to_a_lora_of_a_styled_model(
    here: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    style = style_of(tiny_pipeline, here / "style")
    call = ["turbo", str(tiny_pipeline), "--lora", str(style), "--prompts", "prompts.txt", *TINY]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "with 1 x style.safetensors" in text and "total, estimate" in text and "disk for caches" in text
    assert "measured here: " in text and "6 pictures and 2 steps take about" in text
    run = here / "runs" / "turbo" / "pipeline-style"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["teacher"]["lora"] == str(style) and config["data"]["name"] == "teacher"
    assert config["student"]["kind"] == "lora" and config["student"]["rank"] == 2
    assert config["method"]["name"] == "lcd" and config["method"]["w_min"] == 6.5  # 7.5 - 1
    assert len(list((here / "cache").glob("sampled-*.rows"))) == 1  # none of the rehearsal
    assert sorted(p.name for p in here.iterdir()) == ["cache", "prompts.txt", "runs", "style"]

    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.load_lora_weights(style.parent, weight_name=style.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.scheduler = LCMScheduler.from_pretrained(run / "lora")
    pipe.load_lora_weights(run / "lora")
    fused = DiffusionPipeline.from_pretrained(run / "pipeline")
    calls = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    one, other = (
        p("red cat", generator=torch.Generator().manual_seed(0), **calls).images for p in (pipe, fused)
    )
    assert torch.allclose(one, other, atol=1e-5) and one.std() > 0.005

    assert main(call) == 0
    assert "is finished; nothing was changed" in capsys.readouterr().out
    assert main([*call, "--learning_rate", "1e-3"]) == 2
    assert "started with another learning_rate" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_without_a_rehearsal(
    here: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["turbo", str(tiny_pipeline), "--prompts", "prompts.txt", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(turbo, "rehearse", lambda config: Measured(0.5, 2.0, None))
        patch.setattr(Runner, "_loop", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(call) == 130
    assert "0.5 s a sampled picture, 2 s a step; 6 pictures and 2 steps take about 7 s" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(turbo, "rehearse", None)
    monkeypatch.setattr(turbo, "free_memory", lambda: 0)
    assert main(call) == 0


FAMILIES = {"sd": "lcd", "sdxl": "lcd", "sd3": "rcm", "flux": "rcm", "wan": "rcm"}


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_of_the_families(
    name: str,
    tiny_pipeline: Path,
    tiny_families: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_pipeline if name == "sd" else tiny_families(name)
    assert (
        main(["turbo", str(folder), "--prompts", "prompts.txt", *TINY, "--resolution", "16", "--dry_run"])
        == 0
    )
    text = capsys.readouterr().out
    assert "memory and disk suffice here" in text and not Path("runs").exists()
    assert "total, estimate" in text
    config = configured(folder, "--validation_steps", "1")
    assert config.method["name"] == FAMILIES[name] and config.validation_prompts[0] == "red cat"
    assert config.gradient_checkpointing == (name != "sd")
    if name != "sd" and name != "sdxl":
        guidance = {"sd3": 7.0, "flux": 1.0, "wan": 5.0}[name]
        assert config.method["guidance_scale"] == guidance and not config.student.export_fused
        dmd2 = configured(folder, method="dmd2").method
        assert dmd2["gan_weight"] == 0 and dmd2["guidance_scale"] == guidance
    else:
        assert config.method["w_export"] == {"sd": 6.5, "sdxl": 4.0}[name] and config.student.export_fused
        assert configured(folder, method="dmd2").method["gan_weight"] > 0


def test_every_prompt_gets_pictures_enough(tiny_pipeline: Path) -> None:
    config = turbo.configured(str(tiny_pipeline), None, "prompts.txt", None, None, [])
    assert config.data.images_per_prompt == 171  # 512 of 3 prompts
    assert (
        turbo.configured(
            str(tiny_pipeline), None, "prompts.txt", "lcd", "there", ["--method.w_max", "9"]
        ).method["w_max"]
        == 9
    )


@pytest.mark.parametrize("resource", ["memory", "disk"])
def test_what_does_not_fit_is_refused(
    resource: str,
    tiny_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if resource == "memory":
        monkeypatch.setattr(turbo, "free_memory", lambda: 2**20)
        message = "memory: the run needs about 0.0"
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
        message = "disk: the run writes about"
    call = ["turbo", str(tiny_pipeline), "--prompts", "prompts.txt", *TINY]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fewstep: error: {message}") and error.count("\n") == 1
    assert not Path("runs").exists() and not Path("cache").exists()
    if resource == "memory":
        assert "try --gradient_checkpointing" in error
    assert main([*call, "--dry_run"]) == 0
    assert message in capsys.readouterr().out


def test_memory_that_runs_out_in_the_first_step_is_a_refusal(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "_iteration", full)
    assert main(["turbo", str(tiny_pipeline), "--prompts", "prompts.txt", *TINY]) == 2
    assert "a first step does not fit the device; try --gradient" in capsys.readouterr().err


def test_advice_names_what_is_not_used_yet(tiny_pipeline: Path) -> None:
    config = configured(tiny_pipeline, "--student.rank", "64", "--train_batch_size", "6")
    assert advice(config).split(", ")[:3] == [
        "--gradient_checkpointing", "--mixed_precision bf16", "--train_batch_size 3"
    ]  # fmt: skip
    assert "--student.rank 16" in advice(config)
    small = configured(
        tiny_pipeline, "--gradient_checkpointing", "--mixed_precision", "bf16", "--train_batch_size", "1",
        "--resolution", "16", "--student.rank", "8",
    )  # fmt: skip
    assert "--gradient_checkpointing" not in advice(small) and "--train_batch_size" not in advice(small)


def test_bytes_on_disk(here: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes, against what it wrote: caches exactly, checkpoints and export within a tenth."""
    config = configured(tiny_pipeline, "--output_dir", "run", "--student.rank", "16")
    plan = planned(config)
    needs = disk_needs(plan)
    Runner(config).train()
    rows = sum(p.stat().st_size for p in (here / "cache").glob("*.rows"))
    assert needs[here / "cache"] == rows
    written = sum(p.stat().st_size for p in Path("run").rglob("*") if p.is_file())
    one = sum(p.stat().st_size for p in Path("run/checkpoint-2").rglob("*"))
    assert needs[Path("run")] == pytest.approx(
        written + one, rel=0.15
    )  # the next one is written before it goes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    ((_, size, free),) = full_disks({Path("a/b"): 60, Path("c"): 50})
    assert (size, free) == (110, 100)
    assert not full_disks({Path("a/b"): 60, Path("c"): 40})


def test_a_rehearsal_measures_the_teachers_steps_and_the_students(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling is that of 4 of the declared steps, scaled; iterations are averaged without the first."""
    made: list[int] = []
    monkeypatch.setattr(budget, "seconds", lambda call: (call(), 0.8)[1])
    monkeypatch.setattr(
        TeacherData, "make",
        lambda self, start, stop, texts, make=TeacherData.make: (
            made.append(self.num_inference_steps), make(self, start, stop, texts)
        )[1],
    )  # fmt: skip
    monkeypatch.setattr(Runner, "_iteration", lambda self, i: None)
    monkeypatch.setattr("fewstep.distill.training.runner.seconds", lambda call: (call(), next(taken))[1])
    taken = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    measured = rehearse(configured(tiny_pipeline, "--data.num_inference_steps", "40"))
    assert made == [4, 4]
    assert measured.sampling == pytest.approx(0.8 / 2 * 10) and measured.iteration == 3.0
    assert Measured(2.0, 3.0, None).total(configured(tiny_pipeline), 10) == 26.0
    assert [turbo.duration(s) for s in (12.4, 200, 3900)] == ["12 s", "3 min", "1 h 05 min"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            ["fashion-edm", "--prompts", "prompts.txt"],
            r"model: fashion-edm is a EDMPipeline; turbo takes Stable",
        ),
        (["emoji-sd"], r"data\.prompts: missing"),
        (["emoji-sd", "--prompts", "none.txt"], r"data\.prompts: no file none\.txt"),
        ([], r"the following arguments are required: model"),
        (["emoji-sd", "--prompts", "prompts.txt", "--colour", "red"], r"colour: no such key"),
    ],
)
def test_mistakes(call: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["turbo", *call]) == 2
    error = capsys.readouterr().err
    assert message.replace("\\", "") in error and error.count("\n") == 1


def test_the_style_for_emoji_sd_passes_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(SCRIPTS.parent / "configs" / "emoji" / "style_lora.yaml"), "--dry_run"]) == 0
    assert "LoRA of rank 32" in capsys.readouterr().out


def test_ready_values_that_the_callers_leave_without_effect_are_left_out(tiny_pipeline: Path) -> None:
    short = configured(tiny_pipeline, "--max_train_steps", "40")
    assert (short.lr_warmup_steps, short.validation_steps) == (2, 0)
    plain = configured(tiny_pipeline, "--use_ema", "false", "--lr_scheduler", "constant")
    assert (plain.ema_decay, plain.lr_warmup_steps) == (0.9999, 0)
    with pytest.raises(UserError, match="lr_warmup_steps: 60 is longer than the run"):
        configured(tiny_pipeline, "--max_train_steps", "40", "--lr_warmup_steps", "60")
