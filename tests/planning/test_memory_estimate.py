"""The estimate of `--dry_run` and `fewstep turbo` against what a real step allocates, on tiny pipelines."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.commands import turbo
from fewstep.distill.planning.meta_memory import nbytes
from fewstep.distill.planning.plan import planned
from fewstep.distill.training.runner import Runner
from torch.profiler import ProfilerActivity, profile


def allocated(call: Callable[[], object]) -> int:
    """Peak bytes that a call has allocated and not freed, by the events of torch's CPU allocator."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def states(runner: Runner) -> list[torch.Tensor]:
    """What stays between two steps: frozen parts, the method, the optimisers' moments, the average."""
    teacher: Any = runner.method.parts.teacher
    modules = [*teacher.modules(), runner.method]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [v for o in runner.optimisers.values() for s in o.state.values() for v in s.values() if v.ndim]
    tensors += [] if runner.ema is None else list(runner.ema.buffers())
    return list({id(t): t for t in tensors}.values())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sd", ["--train_batch_size", "8"]),
        ("sdxl", ["--train_batch_size", "4", "--gradient_checkpointing", "false"]),
        ("sd3", ["--train_batch_size", "4", "--gradient_checkpointing", "false"]),
        ("flux", ["--train_batch_size", "4", "--gradient_checkpointing", "false"]),
        ("flux", ["--train_batch_size", "4", "--method.name", "dmd2"]),
    ],
)
def test_the_estimate_is_within_a_fifth_of_the_peak(
    name: str,
    flags: list[str],
    tiny_pipeline: Path,
    tiny_families: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "prompts.txt").write_text("red cat\ndog\n")
    model = tiny_pipeline if name == "sd" else tiny_families(name)
    method = "dmd2" if "dmd2" in flags else None
    own = [f for f in flags if f not in ("--method.name", "dmd2")]
    config = turbo.configured(
        str(model), None, str(tmp_path / "prompts.txt"), method, str(tmp_path / "run"),
        ["--student.rank", "4", "--data.num_inference_steps", "2", "--data.images_per_prompt", "4",
         "--resolution", "16", "--gradient_accumulation_steps", "2", *own],
    )  # fmt: skip
    plan = planned(config)
    runner = Runner(config)
    runner.rehearse(2)  # every player has its moments
    held = nbytes(states(runner))
    step = max(allocated(lambda i=i: runner._iteration(i)) for i in (5, 6))  # type: ignore[misc]
    assert plan.memory is not None and plan.activations is not None
    gradients = plan.held["gradients"]  # allocated in the step
    assert sum(plan.held.values()) - gradients == pytest.approx(held, rel=0.02)
    assert plan.activations + gradients == pytest.approx(step, rel=0.2)
    assert plan.memory[1] == pytest.approx(held + step, rel=0.2)
