"""Step time and peak memory of MeanFlow with each derivative back end, a flow-matching step beside it.

    python scripts/benchmark_meanflow.py [--tokens 64 256 1024 4096] [--ratio 0.25] [--steps 20] [--output FILE]

A step is forward, backward and Adam in float32, on a TwoTimeDiT with the given numbers of tokens and on a UNet2DModel
of 1.5 M parameters at 16 x 16 with batch 16. `flow` is the same step without r < t. Times are taken in turns and
reported as medians with 20 % and 80 % quantiles, of the times and of the paired ratios to `flow`. Memory is measured in
processes of their own: what a step adds to the peak of the resident size on a CPU, torch.cuda.max_memory_allocated on
CUDA.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fewstep.distill.diffusion.derivative import DERIVATIVES
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.meanflow.meanflow import MeanFlow
from fewstep.distill.methods.meanflow.settings import MeanFlowSettings
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from fewstep.distill.training.measure import (
    added_mib,
    environment,
    in_turns,
    printed_number,
    quantiles,
    three_quantiles,
)

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("flow", *DERIVATIVES)
UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 3, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32, "time_embedding_dim": 256,
}  # fmt: skip


def architecture(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """`unet`, or the number of tokens of a transformer with patches of 2 x 2 pixels."""
    if model == "unet":
        return UNET
    side = 2 * round(int(model) ** 0.5)
    if (side // 2) ** 2 != int(model):
        raise SystemExit(f"benchmark: error: tokens {model}: give a square number, such as 64 or 256")
    sizes = {"num_layers": args.layers, "num_attention_heads": args.heads, "attention_head_dim": 64}
    return {
        "_class_name": "TwoTimeDiT", "sample_size": side, "in_channels": 3, "num_class_embeds": None, **sizes,
    }  # fmt: skip


def stepper(model: str, contender: str, args: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """One training step as a call, and the number of trained parameters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = architecture(model, args)
    student = StudentSettings(init="scratch", network=network)
    derivative: Any = {} if contender == "flow" else {"derivative": contender}
    parts = Parts(None, student, [], resolution=network["sample_size"])
    method = MeanFlow(MeanFlowSettings(condition_dropout=0.0, **derivative), parts).to(device).train()
    count = 16 if model == "unet" else args.batch_size
    spans = 0 if contender == "flow" else max(1, round(args.ratio * count))
    t = torch.linspace(0.3, 0.9, count, dtype=torch.float64, device=device)
    r = torch.where(torch.arange(count, device=device) < spans, t / 2, t)
    method.spans = lambda draws: (r, t)  # type: ignore[method-assign]
    images = torch.randn(count, 3, network["sample_size"], network["sample_size"], device=device)
    parameters = method.players()["student"]
    optimiser = torch.optim.Adam(parameters, 1e-4)
    iteration = iter(range(10**9))

    def step() -> None:
        i = next(iteration)
        batch = Batch(Draws(0, i, range(count), device), images=images)
        method("student", batch, Progress(i, 10**9, {"student": i}), {})["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in parameters)


def times(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender, in turns."""
    steps = {name: stepper(model, name, args) for name in CONTENDERS}
    found = in_turns({name: step for name, (step, _) in steps.items()}, args.steps)
    ratios = {k: [a / b for a, b in zip(v, found["flow"], strict=True)] for k, v in found.items()}
    return {
        "parameters": steps["flow"][1],
        "seconds": {k: quantiles(v) for k, v in found.items()},
        "time_ratio": {k: quantiles(v) for k, v in ratios.items() if k != "flow"},
    }


def memory(model: str, contender: str, args: argparse.Namespace) -> float:
    """MiB that the steps of one contender add to the peak of a process of its own."""
    words = ["--memory_of", model, contender, "--ratio", args.ratio, "--batch_size", args.batch_size]
    words += ["--layers", args.layers, "--heads", args.heads, "--threads", args.threads]
    return printed_number(__file__, *words)


def report(args: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {
        "environment": environment(ROOT),
        **{k: getattr(args, k) for k in ("ratio", "batch_size", "steps", "layers", "heads", "threads")},
        "models": {},
    }
    for model in [*map(str, args.tokens), "unet"]:
        row = times(model, args)
        found = {c: [memory(model, c, args) for _ in range(args.memory_runs)] for c in CONTENDERS}
        row["mib"] = {c: statistics.median(v) for c, v in found.items()}
        out["models"][model] = row
        print(as_text(model, row), flush=True)
    return out


def as_text(model: str, row: dict[str, Any]) -> str:
    title = model if model == "unet" else f"transformer, {model} tokens"
    lines = [
        f"{title}, {row['parameters']:,} parameters",
        "| step | ms | / flow | MiB |",
        "|---|---|---|---|",
    ]
    for name, q in row["seconds"].items():
        ratio = three_quantiles(row["time_ratio"][name]) if name in row["time_ratio"] else "1"
        lines.append(f"| {name} | {three_quantiles(q, 1000)} | {ratio} | {row['mib'][name]:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 1024, 4096])
    parser.add_argument(
        "--ratio", type=float, default=0.25, help="share of rows with r < t, at least one row"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="of the transformers")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3, help="of 64 channels each")
    parser.add_argument("--steps", type=int, default=20, help="that are timed, 2 or more")
    parser.add_argument("--memory_runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(added_mib(stepper(*args.memory_of, args)[0]))
        return 0
    result = report(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
