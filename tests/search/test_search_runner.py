"""Searches end to end on a tiny Stable Diffusion: the folder, resuming, determinism, exports, reports."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_search
from fewstep.distill.cli import main
from fewstep.distill.errors import UserError
from fewstep.distill.reports.inputs import Inputs
from fewstep.distill.reports.opening import open_source
from fewstep.distill.search import runner as module
from fewstep.distill.search.checkpoint_set import CheckpointSet
from fewstep.distill.search.runner import SearchRunner
from fewstep.distill.training.run_lock import locked
from huggingface_hub import ModelCard
from safetensors.torch import save_file


def tree(student: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "student": {"path": str(student)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {
            "name": "q_sched",
            "quantisation": None,
            "family": "constant",
            "points": 2,
            "c_x": [0.7, 0.9],
        },
        "fitness": {"kind": "kid"},
        "steps": 2,
        "guidance_scale": 1.0,
        "max_candidates": 5,
        "num_images": 4,
        "finalists": 2,
        "final_images": 6,
        "batch_size": 3,
        "report": None,
        **changes,
    }


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run)]


def pictures(folder: Path, block: int = 5) -> torch.Tensor:
    source = open_source(str(folder), torch.device("cpu"))
    return source.pictures(
        range(3), Inputs.of_captions(["cat", "dog", "red"]), block, source.arguments(2, None)
    )[0]


@pytest.fixture(scope="module")
def searched(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("search") / "run"
    SearchRunner(load_search(tree(tiny_pipeline, run))).search()
    return run


def test_log_of_a_search(searched: Path) -> None:
    log = rows(searched)
    assert [r["step"] for r in log] == list(range(1, len(log) + 1))
    assert [r["phase"] for r in log[:5]] == ["search"] * 5
    assert log[0]["candidate"] == {"c_eps": [1.0, 1.0], "c_x": [1.0, 1.0]}
    assert all(r["phase"] == "final" and r["fitness"] == -r["kid"] for r in log[5:]) and len(log) in (7, 8)
    best = sorted(log[:5], key=lambda r: -r["fitness"])[:2]
    assert [r["candidate"] for r in log[5:7]] == [r["candidate"] for r in best]
    assert log[0]["candidate"] in [r["candidate"] for r in log[5:]]  # the identity is always scored again


def test_the_export_is_the_best_of_the_finalists(searched: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    best = max((r for r in rows(searched) if r["phase"] == "final"), key=lambda r: r["fitness"])["candidate"]
    config = json.loads((searched / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert config["c_eps"] == best["c_eps"] and config["c_x"] == best["c_x"] != [1.0, 1.0]
    sampling = json.loads((searched / "pipeline" / "sampling.json").read_text())
    assert sampling == {"2": {"num_inference_steps": 2, "guidance_scale": 1.0}}
    index = json.loads((searched / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["scheduler_q_sched", "QSchedDDIMScheduler"]
    card = (searched / "pipeline" / "README.md").read_text()
    assert (
        "trust_remote_code=True" in card and f"| c_x | {best['c_x'][0]:.4f}, {best['c_x'][1]:.4f} |" in card
    )
    assert "](samples.png)" in card and "# run in 2 steps (Q-Sched of pipeline)" in card
    assert "eprint = {2509.01624}" in card and "| candidates | " in card
    settings = (searched / "pipeline" / "config.yaml").read_text()
    assert "path: pipeline" in settings and str(tiny_pipeline.parent) not in settings + card
    assert (searched / "pipeline" / "samples.png").is_file()
    again = SearchRunner(load_search(tree(tiny_pipeline, tmp_path / "run")))
    again._build()
    again.source = again._open("full")
    again.source.pipe = again.search_.apply(again.source.pipe, best)
    expected = again.source.pictures(
        range(3), Inputs.of_captions(["cat", "dog", "red"]), 5, dict(again.call)
    )[0]
    assert torch.equal(pictures(searched / "pipeline"), expected)
    assert not torch.equal(expected, pictures_of_the_student(tiny_pipeline))


def pictures_of_the_student(folder: Path) -> torch.Tensor:
    source = open_source(str(folder), torch.device("cpu"))
    return source.pictures(range(3), Inputs.of_captions(["cat", "dog", "red"]), 5, source.arguments(2, 1.0))[
        0
    ]


def test_a_second_search_is_the_same(searched: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    SearchRunner(load_search(tree(tiny_pipeline, tmp_path / "run"))).search()
    assert timeless(tmp_path / "run") == timeless(searched)
    other = tree(tiny_pipeline, tmp_path / "other", seed=1)
    SearchRunner(load_search(other)).search()
    assert [r["fitness"] for r in rows(tmp_path / "other")] != [r["fitness"] for r in rows(searched)]


def test_a_candidate_has_the_same_noise_whatever_was_before(searched: Path, tiny_pipeline: Path) -> None:
    """Common random numbers, and batches of 3 against 4."""
    runner = SearchRunner(load_search(tree(tiny_pipeline, searched / "none", batch_size=4)))
    runner._build()
    runner.source = runner._open("full")
    row = rows(searched)[3]
    runner.source.pipe = runner.search_.apply(runner.source.pipe, row["candidate"])
    assert -runner.fitness(runner._pictures(4, 0), runner._captions(4))["kid"] == pytest.approx(
        row["fitness"]
    )
    assert not torch.equal(runner._pictures(4, 0), runner._pictures(4, 1))
    final = next(r for r in rows(searched) if r["phase"] == "final")
    runner.source.pipe = runner.search_.apply(runner.source.pipe, final["candidate"])
    scored = runner.fitness(runner._pictures(6, 1), runner._captions(6))["fitness"]
    assert scored == pytest.approx(final["fitness"])  # other noise than the search's


@pytest.mark.parametrize("kept", [0, 3, 5, 6])
def test_a_cut_search_goes_on_to_the_same_end(
    searched: Path, tiny_pipeline: Path, tmp_path: Path, kept: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(searched / "config.yaml", run)
    config = (run / "config.yaml").read_text().replace(str(searched), str(run))
    (run / "config.yaml").write_text(config)
    lines = (searched / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])  # the last was cut short
    SearchRunner(load_search(tree(tiny_pipeline, run))).search()
    assert timeless(run) == timeless(searched)
    assert rows(run)[:kept] == rows(searched)[:kept]  # their seconds too: not scored again


def test_finished_changed_and_training_keys(
    searched: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_pipeline, searched)))
    before = (searched / "log.jsonl").read_bytes()
    assert main(["distill", str(path)]) == 0
    assert "is finished: searched and exported; nothing was changed" in capsys.readouterr().out
    assert main(["distill", str(path), "--num_images", "5", "--method.points", "1"]) == 2
    error = capsys.readouterr().err
    assert "was started with another method.points, num_images" in error.replace("\n", " ")
    assert main(["distill", str(path), "--learning_rate", "1e-3"]) == 2
    assert "learning_rate: belongs to training; q_sched is a search" in capsys.readouterr().err
    assert main(["distill", str(path), "--max_candidate", "3"]) == 2
    assert "max_candidate: no such key; the nearest is max_candidates" in capsys.readouterr().err
    assert (searched / "log.jsonl").read_bytes() == before


def test_an_interrupt_stops_after_the_candidate_and_resumes(
    searched: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SearchRunner(load_search(tree(tiny_pipeline, tmp_path / "run")))
    score, calls = runner._score, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return score(*arguments)

    monkeypatch.setattr(runner, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.search()
    assert len(rows(tmp_path / "run")) == 2 and not runner.finished()
    SearchRunner(load_search(tree(tiny_pipeline, tmp_path / "run"))).search()
    assert timeless(tmp_path / "run") == timeless(searched)


def test_sigterm_stops_at_once_and_keeps_every_candidate(
    searched: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = tmp_path / "run", tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_pipeline, run)))
    pictures, calls = SearchRunner._pictures, []

    def terminated(self: SearchRunner, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return pictures(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SearchRunner, "_pictures", terminated)
        assert main(["distill", str(path)]) == 143
    assert len(rows(run)) == 2 and not (run / ".lock").exists()
    assert main(["distill", str(path)]) == 0
    assert timeless(run) == timeless(searched)


def test_a_search_folder_in_use_is_refused_and_a_damaged_export_made_again(
    searched: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = shutil.copytree(searched, tmp_path / "run"), tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(tree(tiny_pipeline, run)))
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    capsys.readouterr()
    with locked(run):
        assert main(["distill", str(path)]) == 2
    assert f"output_dir: {run} is in use by process {os.getpid()} " in capsys.readouterr().err
    assert main(["distill", str(path)]) == 0
    assert torch.equal(pictures(run / "pipeline"), pictures(searched / "pipeline"))
    assert timeless(run) == timeless(searched)


def test_a_search_that_was_refused_begins_anew_with_other_values(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student that the first start prepared had another scheduler."""
    run, path = tmp_path / "run", tmp_path / "search.yaml"
    student = {"path": str(tiny_pipeline), "scheduler": "DDPMScheduler"}
    method = {"name": "q_sched", "quantisation": None, "family": "constant", "points": 1, "c_x": [0.7, 0.9]}
    plain = tree(tiny_pipeline, run, method=method, max_candidates=2)
    wrong = {**plain, "student": student, "data": {"name": "emoji-noto", "split": "scor"}}
    path.write_text(yaml.safe_dump(wrong))
    assert main(["distill", str(path)]) == 2
    assert "scor" in capsys.readouterr().err and (run / "student").is_dir()
    path.write_text(yaml.safe_dump({**plain, "student": {**student, "scheduler": "DDIMScheduler"}}))
    assert main(["distill", str(path)]) == 0
    index = json.loads((run / "student" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert yaml.safe_load((run / "config.yaml").read_text())["student"]["scheduler"] == "DDIMScheduler"


def test_pictures_that_are_not_finite_lose(tiny_pipeline: Path, tmp_path: Path) -> None:
    """c_x of 1e30 overflows; the search goes on, and the candidate is not chosen."""
    method = {"name": "q_sched", "quantisation": None, "family": "constant", "points": 2, "c_x": [0.9, 1e38],
              "c_eps": [1.0, 1e38]}  # fmt: skip
    SearchRunner(load_search(tree(tiny_pipeline, tmp_path / "run", method=method))).search()
    log = rows(tmp_path / "run")
    assert any(r["fitness"] is None for r in log[:5]) and log[0]["fitness"] is not None
    config = json.loads((tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert config.get("c_x", [1.0])[0] < 2


def test_report_and_cells(tiny_pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    run = tmp_path / "run"
    method = {"name": "q_sched", "quantisation": "w4a8", "family": "constant", "points": 1, "c_x": [0.8, 0.8]}
    report = {"split": "holdout", "holdout": None, "num_images": 7, "seeds": 2}
    config = tree(tiny_pipeline, run, method=method, max_candidates=2, report=report)
    text = SearchRunner(load_search(config)).search()
    names = ["quantised-tuned", "quantised-identity", "full-tuned", "full-identity"]
    record = json.loads((run / "report.json").read_text())
    assert (
        [f"{c['subject']}-{c['name']}" for c in record["cells"]]
        == names
        == [r["model"] for r in record["rows"]]
    )
    size = {r["model"]: r["bytes"] for r in record["rows"]}
    held = dict(zip(names, (c["held"] for c in record["cells"]), strict=True))
    assert (
        size["quantised-identity"] < size["full-identity"]
        and held["quantised-tuned"] < held["full-tuned"] / 2
    )
    for name in names:
        folder = run / ("pipeline" if name == "quantised-tuned" else f"cells/{name}")
        assert size[name] > sum(p.stat().st_size for p in folder.rglob("*") if p.name != "README.md") * 0.9
        card = ModelCard.load(folder / "README.md")
        assert "## Scores" in card.text and name in text
        own = next(r for r in record["rows"] if r["model"] == name)
        assert {r.metric_value for r in card.data.eval_results} == {s["value"] for s in own["scores"]}
        assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {
            ("emoji-noto", "holdout")
        }
    assert all(r["seconds_per_image"] > 0 and r["nfe"] == 2 for r in record["rows"])
    scores = {s["protocol"]["reference"] for r in record["rows"] for s in r["scores"]}
    assert {s.split(",")[0] for s in scores} == {"emoji-noto/holdout"}
    assert len(record["verdicts"]) == 3 and "won back" in record["verdicts"][2]
    index = json.loads((run / "cells" / "full-identity" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    full = DiffusionPipeline.from_pretrained(run / "cells" / "full-identity")
    student = DiffusionPipeline.from_pretrained(tiny_pipeline)
    assert all(
        torch.equal(a, b) for a, b in zip(full.unet.parameters(), student.unet.parameters(), strict=True)
    )


def test_a_search_may_not_report_on_its_own_split(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.split: score is what the search itself sees"):
        load_search(tree(tiny_pipeline, tmp_path, report={"split": "score"}))
    load_search(tree(tiny_pipeline, tmp_path, report={"split": "score", "name": "emoji-twemoji"}))


def test_noise_of_the_search_is_no_noise_of_a_report() -> None:
    """Blocks of a report are 0 to seeds - 1."""
    assert module.SEARCH_BLOCK >= 1000


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose four raw checkpoints are the student's weights with noise."""
    run = tmp_path_factory.mktemp("trained") / "run"
    (run / "raw_weights").mkdir(parents=True)
    shutil.copytree(tiny_pipeline, run / "pipeline")
    (run / "config.yaml").write_text("method: {name: lcd}\n")
    unet = DiffusionPipeline.from_pretrained(tiny_pipeline).unet
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        weights = {
            f"student.denoiser.network.{k}": p.detach() + 0.02 * torch.randn(p.shape, generator=generator)
            for k, p in unet.named_parameters()
        }
        save_file(
            {**weights, "other.lambda": torch.ones(1)}, run / "raw_weights" / f"step-{step:08d}.safetensors"
        )
    return run


def test_lcsc_from_a_run_folder(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    method = {"name": "lcsc", "rates": [0.5], "sigma": 1.0}
    config = tree(trained, run, method=method, max_candidates=8, num_images=6,
                  report={"split": "holdout", "holdout": None, "num_images": 6, "seeds": 2})  # fmt: skip
    SearchRunner(load_search(config)).search()
    record = json.loads((run / "report.json").read_text())
    assert [c["name"] for c in record["cells"]] == ["tuned", "student", "last", "uniform", "ema"]
    final = [r for r in rows(run) if r["phase"] == "final"]
    best = max(final, key=lambda r: r["fitness"])["candidate"]["alpha"]
    exported = DiffusionPipeline.from_pretrained(run / "pipeline").unet.state_dict()
    sets = CheckpointSet.of(trained)
    for name in ("conv_in.weight", "mid_block.resnets.0.norm1.bias"):
        expected = sum(
            a * sets.tensor(i, f"student.denoiser.network.{name}").double() for i, a in enumerate(best)
        )
        torch.testing.assert_close(exported[name], expected.float())
    own = DiffusionPipeline.from_pretrained(run / "cells" / "student-student").unet.state_dict()
    raw = DiffusionPipeline.from_pretrained(trained / "pipeline").unet.state_dict()
    assert all(torch.equal(own[k], raw[k]) for k in raw)
    assert len(record["verdicts"]) == 4 and record["verdicts"][0].startswith(
        "student-tuned against student-student"
    )


def test_mwa_is_none_of_the_means_that_it_is_compared_with(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    method = {"name": "lcsc", "family": "mwa", "metric": "step", "penalties": [1.0, 2.0]}
    SearchRunner(load_search(tree(trained, run, method=method, finalists=1))).search()
    (search,), final = (
        [r for r in rows(run) if r["step"] == 4],
        [r for r in rows(run) if r["phase"] == "final"],
    )
    assert search["phase"] == "search" and len(rows(run)) == 4 + 3
    assert final[0]["candidate"]["alpha"] in (
        [0.1, 0.2, 0.3, 0.4],
        pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    )
    exported = DiffusionPipeline.from_pretrained(run / "pipeline").unet.state_dict()["conv_in.bias"]
    alpha = final[0]["candidate"]["alpha"]
    sets = CheckpointSet.of(trained)
    torch.testing.assert_close(exported, sets.combined("student.denoiser.network.conv_in.bias", alpha))


def test_exports_open_without_this_project(searched: Path) -> None:
    code = (
        "import sys, json, torch\n"
        "from diffusers import DiffusionPipeline\n"
        f"folder = {str(searched / 'pipeline')!r}\n"
        "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)\n"
        "call = json.load(open(folder + '/sampling.json'))['2']\n"
        "generators = [torch.Generator().manual_seed(5_000_000 + i) for i in range(3)]\n"
        "out = pipe(['cat', 'dog', 'red'], generator=generators, output_type='pt', **call).images\n"
        "assert not any(name.startswith('fewstep') for name in sys.modules)\n"
        "torch.save((out * 255).round().clamp(0, 255).to(torch.uint8), sys.argv[1])\n"
    )
    out = searched.parent / "opened.pt"
    subprocess.run(
        [sys.executable, "-c", code, str(out)], check=True, capture_output=True, cwd=searched.parent
    )
    assert torch.equal(torch.load(out), pictures(searched / "pipeline"))
