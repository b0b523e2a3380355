"""`import fewstep`: light, typed, and as its docstrings say."""

import doctest
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fewstep
import pytest
import torch
from fewstep.distill.catalog import recipes
from fewstep.distill.commands import python

from ..runs import train


@pytest.fixture(autouse=True, scope="module")
def own_place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One empty folder and one cache for the examples of all docstrings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.chdir(tmp_path_factory.mktemp("place"))
        yield


@pytest.fixture
def tree(tiny_pipeline: Path, tmp_path: Path) -> dict[str, Any]:
    """A latent consistency distillation of two steps."""
    return {
        "output_dir": tmp_path / "run",
        "teacher": {"path": str(tiny_pipeline)},
        "data": {"name": "emoji-noto"},
        "method": {"name": "lcd", "guidance_dim": 16, "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
    }


def test_the_examples_of_all_docstrings_run() -> None:
    finder, told = doctest.DocTestFinder(exclude_empty=True), []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    examples = finder.find(fewstep, "fewstep", globs={})
    for module in (python, recipes):
        examples += finder.find(module, globs={"fewstep": fewstep})
    named = {test.name.rpartition(".")[2] for test in examples if test.examples}
    assert named == {"fewstep", "Run", "run", "evaluate", "sample", "compare", "methods", "recipes"}
    first = [test for test in examples if test.name == "fewstep"]
    rest = sorted((t for t in examples if t.name != "fewstep"), key=lambda t: t.lineno or 0)
    for test in (*first, *rest):
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


def test_importing_it_takes_no_torch_and_names_the_version() -> None:
    program = "import fewstep, sys; print(*({'torch', 'diffusers', 'numpy'} & set(sys.modules)), fewstep.__version__)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == [version("fewstep")] == [fewstep.__version__]


def test_run_trains_a_dict_once_as_the_command_does(tree: dict[str, Any], tmp_path: Path) -> None:
    run = fewstep.run(tree, seed=1, method={"w_max": 4.0})
    assert (run.folder, repr(run)) == (tmp_path / "run", f"Run({str(tmp_path / 'run')!r})")
    log = (run.folder / "log.jsonl").read_bytes()
    again = fewstep.run(tree, seed=1, method={"w_max": 4.0})
    assert again.folder == run.folder and (run.folder / "log.jsonl").read_bytes() == log
    with pytest.raises(fewstep.UserError, match=r"started with another method\.w_max"):
        fewstep.run(tree, seed=1)

    method = {**tree["method"], "w_max": 4.0}
    train({**tree, "seed": 1, "method": method, "output_dir": str(tmp_path / "by_command")})
    losses = [[json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
              for folder in (run.folder, tmp_path / "by_command")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 1

    pipeline, saved = run.pipeline(), json.loads((run.folder / "pipeline" / "sampling.json").read_text())
    assert run.calls == {int(steps): call for steps, call in saved.items()}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    a, b = (pipeline("cat", generator=g, output_type="pt", **run.calls[1]).images for g in generators)
    assert torch.equal(a, b) and a.std() > 0


def test_run_searches_where_the_method_is_a_search(
    tree: dict[str, Any], tmp_path: Path, lcm_pipeline: Path
) -> None:
    search = {
        "output_dir": str(tmp_path / "search"),
        "student": {"path": str(lcm_pipeline)},
        "data": {"name": "emoji-noto", "split": "reward"},
        "method": {"name": "q_sched", "points": 2, "c_eps": [0.9, 1.1], "c_x": [1.0, 1.0], "family": "constant",
                   "strategy": "grid"},
        "steps": 1, "fitness": {"kind": "kid"}, "max_candidates": 5, "num_images": 2, "finalists": 1,
        "final_images": 2, "report": None,
    }  # fmt: skip
    run = fewstep.run(search)
    assert run.calls[1]["num_inference_steps"] == 1
    log = (run.folder / "log.jsonl").read_bytes()
    assert fewstep.run(search, seed=0).folder == run.folder and (run.folder / "log.jsonl").read_bytes() == log


def test_a_lora_without_a_pipeline_says_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    for what in (fewstep.Run(tmp_path).pipeline, lambda: fewstep.Run(tmp_path).calls):
        with pytest.raises(fewstep.UserError, match=r"holds a LoRA and no pipeline; load .*lora into"):
            what()
    with pytest.raises(fewstep.UserError, match="holds no exported pipeline"):
        fewstep.Run(tmp_path / "nowhere").pipeline()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fewstep.run("emoji/lcdd"), "the nearest recipe is emoji/lcd"),
        (lambda: fewstep.run("emoji/teacher"), "emoji/teacher: trains a teacher in stages"),
        (lambda: fewstep.run("emoji/lcd", seeed=1), "seeed: no such key; the nearest is seed"),
        (lambda: fewstep.run("emoji/lcd", method="rcm"), "method: 'rcm' has no name"),
        (lambda: fewstep.evaluate("emoji-sd", protocol="cifar10-50k", split="train"), "split: has no effect beside"),
        (lambda: fewstep.evaluate("emoji-sd", protocol="cifar10-50k", extractor="x"), "extractor: has no effect"),
        (lambda: fewstep.sample("emoji-sd", "x", steps=1, prompts="a", data="emoji"), "prompts: a stands in place"),
    ],
)  # fmt: skip
def test_mistakes_are_user_errors_and_leave_nothing_behind(call: Any, said: str) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(fewstep.UserError, match=said):
        call()
    assert sorted(Path().iterdir()) == before


def test_methods_and_recipes_are_the_lists_of_the_commands() -> None:
    assert set(fewstep.methods()) >= {"lcd", "rcm", "q_sched"}
    assert fewstep.recipes() == recipes.recipes()
