"""The benchmarks of continuous-time methods at tiny sizes: every row is there, and is what its title says."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fewstep.distill.training.measure import in_turns, three_quantiles

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZES = ["--layers", "1", "--heads", "1", "--steps", "2", "--memory_runs", "1", "--threads", "1"]


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_rcm_every_player_and_back_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = loaded("benchmark_rcm", monkeypatch)
    real, asked = benchmark.memory, []

    def memory(tokens: int, title: str, args: object) -> float:
        asked.append(title)
        return real(tokens, title, args) if title == "score, 2 steps" else 1.0  # a process each takes seconds

    monkeypatch.setattr(benchmark, "memory", memory)
    output = tmp_path / "benchmark.json"
    words = ["--tokens", "16", "--num_steps", "1", "2", "--batch_size", "2", *SIZES, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_rcm.py", *words])
    assert benchmark.main() == 0
    found = json.loads(output.read_text())
    assert set(found["environment"]) == {"device", "commit", "python", "torch", "diffusers", "triton"}
    backs = ("kernel", "math", "double_backward", "finite_difference")
    titles = ["fake_score", *(f"student, {b}" for b in backs), *(f"sCM, {b}" for b in backs)]
    titles += ["score, 1 steps", "score, 2 steps"]
    row = found["tokens"]["16"]
    assert list(row["seconds"]) == list(row["mib"]) == titles == asked
    assert all(0 < q["q20"] <= q["median"] <= q["q80"] for q in row["seconds"].values())
    assert set(row["time_ratio"]) == set(titles[1:]) and row["mib"]["score, 2 steps"] > 0


def test_rcm_steps_are_those_of_their_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = loaded("benchmark_rcm", monkeypatch)
    from fewstep.distill.methods.score_distillation.rcm import RCM

    seen: list[tuple[str, int, str, set[str]]] = []
    forward = RCM.forward

    def note(self, player, batch, progress, carry):
        out = forward(self, player, batch, progress, carry)
        steps = progress.updates[player] % self.settings.max_rollout + 1
        seen.append((player, steps, self.settings.derivative, set(out)))
        return out

    monkeypatch.setattr(RCM, "forward", note)
    parser_args = type("Args", (), {"num_steps": [1, 4], "batch_size": 2, "layers": 1, "heads": 1})
    for title in ("fake_score", "student, math", "sCM, double_backward", "score, 1 steps"):
        benchmark.stepper(16, title, parser_args)[0]()
    assert seen[0][:2] == ("fake_score", 4)
    assert seen[1][:3] == ("student", 4, "math") and {"consistency", "score"} <= seen[1][3]
    assert seen[2][2] == "double_backward" and "score" not in seen[2][3]
    assert seen[3][1] == 1 and "consistency" not in seen[3][3]


def test_times_are_taken_in_turns() -> None:
    calls: list[str] = []
    found = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3 and {k: len(v) for k, v in found.items()} == {"a": 2, "b": 2}
    assert three_quantiles({"median": 0.0012345, "q20": 0.001, "q80": 0.002}, 1000) == "1.234 (1 to 2)"


@pytest.mark.slow
def test_meanflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = loaded("benchmark_meanflow", monkeypatch)
    monkeypatch.setattr(benchmark, "memory", lambda *_: 1.0)
    monkeypatch.setattr(
        benchmark, "UNET", {**benchmark.UNET, "block_out_channels": [8, 8], "attention_head_dim": 8}
    )
    output = tmp_path / "benchmark.json"
    words = ["--tokens", "16", "--batch_size", "2", *SIZES, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_meanflow.py", *words])
    assert benchmark.main() == 0
    found = json.loads(output.read_text())["models"]
    assert list(found) == ["16", "unet"]
    assert list(found["16"]["seconds"]) == ["flow", "kernel", "math", "double_backward", "finite_difference"]
    assert torch.get_num_threads() == 1
