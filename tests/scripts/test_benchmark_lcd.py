"""The benchmark's plain step is the same algorithm as ours: with the same random numbers both go the same way."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_lcd_step.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_lcd_step", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return module


def test_losses_agree_over_steps_and_times_are_paired(
    benchmark: ModuleType, tiny_pipeline: Path, tmp_path: Path
) -> None:
    runner = benchmark.our_runner(str(tiny_pipeline), tmp_path / "run", 4)
    plain = benchmark.PlainLCD(str(tiny_pipeline), runner.accelerator.device)
    losses = benchmark.compare_losses(runner, plain, steps=3)
    assert len(losses) == 3
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-4)
    times = benchmark.paired_times(runner, plain, steps=2, first=3)
    assert len(times) == 2 and all(a > 0 and b > 0 for a, b in times)


def test_a_wrong_target_decay_shows_in_the_losses(
    benchmark: ModuleType, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.OPTIMISER, "learning_rate", 1e-2)
    runner = benchmark.our_runner(str(tiny_pipeline), tmp_path / "run", 4)
    plain = benchmark.PlainLCD(str(tiny_pipeline), runner.accelerator.device)
    monkeypatch.setitem(benchmark.METHOD, "target_decay", 0.5)
    losses = benchmark.compare_losses(runner, plain, steps=3)
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-4)
    assert losses[-1][0] != pytest.approx(losses[-1][1], rel=1e-3)


def test_quantiles(benchmark: ModuleType) -> None:
    assert benchmark.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
