"""scripts/benchmark_attention.py: a wrong result is not timed, and rows hold what the header says."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fewstep.kernels import chunked

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_attention.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_attention", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.SHAPES, "cpu-2048", (1, 2, 100, 130, 16))
    return module


def test_a_wrong_result_is_not_timed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = chunked.forward

    def wrong(*arguments):
        out, tangent, lse = right(*arguments)
        return out, None if tangent is None else 1.001 * tangent, lse

    monkeypatch.setattr(chunked, "forward", wrong)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--shapes", "cpu-2048"])
    assert script.main() == 1
    captured = capsys.readouterr()
    assert "refusing" in captured.err and "tO of float32, D = 16" in captured.err and not captured.out


@pytest.mark.parametrize("contender", ["ours", "math", "differences"])
def test_a_row(script: ModuleType, contender: str) -> None:
    cell = {"shape": "cpu-2048", "dtype": "float32", "pass": "jvp", "contender": contender}
    found = script.measure_cell({**cell, "device": "cpu", "repeats": 3})
    row = script.finish({**cell, **found}, gemm=1e9, copy=1e12)
    products = 8 if contender == "differences" else 12
    assert row["floor_seconds"] == pytest.approx(products * 2 * 100 * 130 * 16 / 1e9)
    assert row["tflops"] * row["seconds"]["median"] == pytest.approx(products * 2 * 100 * 130 * 16 / 1e12)
    assert row["error"] < (1e-2 if contender == "differences" else 1e-5)
    assert len(script.as_line(row)) == len(script.HEADER)


def test_what_cannot_run_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", None)
    cell = {"shape": "cpu-2048", "dtype": "float32", "pass": "jvp", "contender": "jvp-flash-attention"}
    assert "jvp_flash_attention" in script.measure_cell({**cell, "device": "cpu", "repeats": 3})["failed"]
    monkeypatch.setitem(script.SHAPES, "cpu-2048", (1, 8, 2**20, 2**20, 64))
    row = script.run_cell({**cell, "contender": "math", "device": "cpu", "repeats": 3})
    assert row["failed"].startswith("does not fit: needs about 163840 GiB")
    assert len(script.as_line({**cell, **row})) == len(script.HEADER)


def test_plots_and_tables_are_json_and_png(script: ModuleType, tmp_path: Path) -> None:
    quantiles = {"median": 0.1, "q20": 0.1, "q80": 0.1}
    row = {"shape": "cpu-2048", "dtype": "float32", "pass": "jvp", "contender": "ours", "seconds": quantiles}
    script.plot([{**row, "extra_mib": 3.0}, {**row, "failed": "no"}], tmp_path)
    for name in ("time", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_name_their_machine() -> None:
    for file in (SCRIPT.parents[1] / "kernels" / "results").glob("*/results.json"):
        result = json.loads(file.read_text())
        assert {"device", "commit", "torch", "triton", "threads", "load", "rates"} <= set(
            result["environment"]
        )
        assert torch.tensor([r["seconds"]["median"] for r in result["rows"] if "failed" not in r]).min() > 0
