"""A student that predicts something else than its teacher: what it learns first, what is exported, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.cli import main
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.denoiser import Denoiser, Prediction
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.score_distillation.dmd2 import DMD2
from fewstep.distill.methods.score_distillation.settings import DMD2Settings
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from fewstep.distill.training.conversion import Phases, conversion_loss, in_terms
from fewstep.distill.training.runner import Runner

from ..runs import lasting
from .test_runner import command, settings

V = StudentSettings(prediction="v_prediction", conversion_steps=3)


@pytest.fixture
def teacher(tiny_pipeline: Path) -> LatentTeacher:
    found = Teacher.load(TeacherSettings(str(tiny_pipeline)))
    assert isinstance(found, LatentTeacher)
    return found


def batch(teacher: LatentTeacher, size: int = 3) -> Batch:
    captions = ["red cat", "a dog", ""][:size]
    posterior = torch.cat([torch.randn(size, *teacher.shape), torch.full((size, *teacher.shape), -30.0)], 1)
    draws = Draws(0, 0, list(range(size)), torch.device("cpu"))
    return Batch(draws, latents=posterior, condition=teacher.condition(captions), captions=captions)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_in_other_terms_is_the_same_prediction(teacher: LatentTeacher, kind: str) -> None:
    process = teacher.noise
    t = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
    x_t, output = (torch.randn(3, *teacher.shape, dtype=torch.float64) for _ in range(2))
    for given in ("epsilon", "v_prediction", "sample"):
        seen = Prediction(output, x_t, t, process, given)
        again = Prediction(in_terms(seen, kind), x_t, t, process, kind)
        assert torch.allclose(again.x0, seen.x0, rtol=1e-9, atol=1e-9)
        assert torch.allclose(again.eps, seen.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_the_loss_by_the_stock_scheduler(teacher: LatentTeacher, kind: Any) -> None:
    """State and v by diffusers' scheduler, x0 by its own rule; the student is the teacher's network, misread."""
    student = Student(teacher.denoiser, StudentSettings(prediction=kind, conversion_steps=1))
    given = batch(teacher)
    loss = conversion_loss(student, teacher, given)
    draws = Draws(0, 0, [0, 1, 2], torch.device("cpu"))
    z0 = teacher.latents(given.latents, draws)
    stock = DDPMScheduler.from_config(teacher.pipeline.scheduler.config)
    t = draws.integers(0, 1000)
    eps = draws.normal(teacher.shape)
    x_t = stock.add_noise(z0, eps, t)
    told = given.condition.arguments
    with torch.no_grad():
        output = teacher.denoiser.network(x_t, t, **told).sample
    a = stock.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    x0 = (x_t - (1 - a * a).sqrt() * output) / a
    target = x0 if kind == "sample" else stock.get_velocity(x0, output, t)
    assert loss.item() == pytest.approx((output - target).square().mean().item(), rel=1e-4)
    loss.backward()
    moved = [p.grad for p in student.trained().values() if p.grad is not None]
    assert moved and all(g.isfinite().all() for g in moved)
    assert all(p.grad is None for p in teacher.denoiser.network.parameters())


class Exact(Denoiser):
    """What the teacher says, in terms of v: the student that conversion aims at."""

    def __init__(self, inner: Denoiser):
        super().__init__(inner.network, inner.process, "v_prediction")
        self.inner = inner

    def call(self, *args: Any) -> Any:
        raise AssertionError

    def forward(self, x_t: Any, t: Any, condition: Condition, **_: Any) -> Prediction:
        seen = self.inner(x_t, t, condition)
        return Prediction(seen.v, x_t, t, self.process, "v_prediction")


def test_nothing_is_left_to_learn_at_the_solution(teacher: LatentTeacher) -> None:
    student = Student(teacher.denoiser, V)
    assert conversion_loss(student, teacher, batch(teacher)).item() > 0.1
    student.denoiser = Exact(teacher.denoiser)
    assert conversion_loss(student, teacher, batch(teacher)).item() == 0


def test_the_method_sees_its_own_iterations_alone(teacher: LatentTeacher) -> None:
    """DMD2's student moves in every fifth iteration: of the method's, not of the run's."""
    method = DMD2(DMD2Settings(), Parts(teacher, V, ["red cat"], resolution=16))
    phases, plain = Phases(method, 3), Phases(method, 0)
    updates = {"student": 3, "fake_score": 0}
    assert [phases.turns(Progress(i, 20, updates)) for i in range(3)] == [("student",)] * 3
    seen = phases.progress(Progress(4, 20, updates))
    assert (seen.iteration, seen.total, seen.updates) == (1, 17, {"student": 0, "fake_score": 0})
    for i in range(12):
        after = phases.turns(Progress(3 + i, 23, updates))
        assert after == plain.turns(Progress(i, 20, {"student": 0, "fake_score": 0}))


def converted(teacher: Path, output: Path, **changes: Any) -> dict[str, Any]:
    student = {"prediction": "v_prediction", "conversion_steps": 3}
    return settings(teacher, output, student=student, max_train_steps=6, **changes)


def rows(run: Path) -> list[dict[str, Any]]:
    return [lasting(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both phases in the log; the export's scheduler says the student's prediction and the export is the sampler's twin
    (`check_export`); one that was stopped inside the conversion and again after it ends the same."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    assert main(command(converted(tiny_pipeline, tmp_path / "whole"), tmp_path)) == 0
    assert "v_prediction learnt in the first 3 steps" in capsys.readouterr().out
    whole = rows(tmp_path / "whole")
    assert ["conversion_loss" in row for row in whole] == [True] * 3 + [False] * 3
    pipeline = tmp_path / "whole" / "pipeline"
    scheduler = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert "v_prediction learnt in the first 3 steps" in (pipeline / "README.md").read_text()

    class Stop(BaseException):
        pass

    flags = command(converted(tiny_pipeline, tmp_path / "parts", checkpointing_steps=1), tmp_path)
    for stop in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            save = Runner._save

            def saved(self: Runner, stop: int = stop, save: Any = save) -> None:
                save(self)
                if self.step == stop:
                    raise Stop

            patch.setattr(Runner, "_save", saved)
            with pytest.raises(Stop):
                main(flags)
    assert main(flags) == 0
    assert rows(tmp_path / "parts") == whole


@pytest.mark.parametrize(
    "method",
    [
        {"name": "scott", "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2, "lambda_adv": 0},
        {"name": "rcm"},
        {"name": "dmd2"},
    ],
    ids=lambda m: m["name"],
)
def test_the_other_methods_that_take_it(
    method: dict[str, Any], tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several players too: the one that is exported converts alone, and the export is the sampler's twin."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    tree = converted(tiny_pipeline, tmp_path / "run", method=method)
    assert main(command(tree, tmp_path)) == 0
    for row in rows(tmp_path / "run"):
        converting = any(key.endswith("conversion_loss") for key in row)
        assert converting == (row["step"] <= 3)
        assert not (converting and any(key.startswith("fake_score/") for key in row))
    pipeline = tmp_path / "run" / "pipeline"
    scheduler = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert "Checked at export" in (pipeline / "README.md").read_text()


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (
            {"kind": "lora", "prediction": "sample", "conversion_steps": 2},
            "student.prediction: sample: a LoRA",
        ),
        ({"prediction": "epsilon", "conversion_steps": 2}, "epsilon is what the teacher gives already"),
        ({"prediction": "v_prediction"}, "student.conversion_steps: 0, but"),
        (
            {"conversion_steps": 2},
            "student.conversion_steps: 2 has no effect beside student.prediction: null",
        ),
        (
            {"prediction": "sample", "conversion_steps": 9},
            "student.conversion_steps: 9 is longer than the run",
        ),
        ({"prediction": "velocity", "conversion_steps": 2}, "student.prediction"),
    ],
)
def test_refusals(student: dict[str, Any], words: str, tiny_pipeline: Path, tmp_path: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tree = settings(tiny_pipeline, tmp_path / "run", student=student)
    if student.get("kind") != "lora":
        tree["method"]["guidance_dim"] = 16
    assert main(command(tree, tmp_path)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_other_methods_and_new_weights(tiny_pipeline: Path) -> None:
    student = {"prediction": "v_prediction", "conversion_steps": 2}
    tree = settings(tiny_pipeline, Path("run"), student=student)
    with pytest.raises(UserError, match=r"student\.prediction: has no effect on method meanflow"):
        load_config({**tree, "method": {"name": "meanflow"}})


def test_a_flow_stays_one(tiny_families: Callable[[str], Path]) -> None:
    teacher = Teacher.load(TeacherSettings(str(tiny_families("sd3"))))
    with pytest.raises(
        UserError, match=r"student\.prediction: .* scheduler for velocity alone; leave the key"
    ):
        Student(teacher.denoiser, V)
