"""Step time and peak memory of rCM per player and derivative back end.

    python scripts/benchmark_rcm.py [--tokens 64 256 1024 4096] [--num_steps 1 4] [--steps 20] [--output FILE]

Every row is a full step in float32, forward, backward and Adam, on a transformer with patches of 2 x 2 pixels: the
student's by each back end of its derivative (consistency term, rollout, score term), without the score term (sCM),
without the consistency term (the score term after a rollout of each number of steps), and the fake score's. Times are
taken in turns and reported as medians with 20 % and 80 % quantiles, and as paired ratios to `fake_score`. Memory is
measured in processes of their own: what a step adds to the peak of the resident size on a CPU,
torch.cuda.max_memory_allocated on CUDA.
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
from fewstep.distill.diffusion.process import RectifiedFlow
from fewstep.distill.methods.score_distillation.rcm import RCM
from fewstep.distill.methods.score_distillation.settings import RCMSettings
from fewstep.distill.models.network_adapters import TwoTimeDiTDenoiser
from fewstep.distill.models.teacher import Teacher
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
from fewstep.pipelines.transformer_two_time import TwoTimeDiT

ROOT = Path(__file__).resolve().parents[1]
BASE = "fake_score"


class NewTeacher(Teacher):
    """A teacher of straight paths with new weights: a step costs the same."""

    def __init__(self, network: TwoTimeDiT):
        self.denoiser = TwoTimeDiTDenoiser(network.requires_grad_(False).eval(), RectifiedFlow(), "velocity")
        self.path, self.resolution = "new weights", network.config.sample_size


def contenders(args: argparse.Namespace) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Player, steps of the rollout, and settings by title."""
    most = max(args.num_steps)
    rows: dict[str, tuple[str, int, dict[str, Any]]] = {BASE: ("fake_score", most, {})}
    rows |= {f"student, {by}": ("student", most, {"derivative": by}) for by in DERIVATIVES}
    rows |= {f"sCM, {by}": ("student", 1, {"derivative": by, "score_weight": 0.0}) for by in DERIVATIVES}
    rows |= {f"score, {n} steps": ("student", n, {"scm_weight": 0.0}) for n in args.num_steps}
    return rows


def stepper(tokens: int, title: str, args: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """One training step as a call, and the number of the player's parameters."""
    side = 2 * round(tokens**0.5)
    if (side // 2) ** 2 != tokens:
        raise SystemExit(f"benchmark: error: tokens {tokens}: give a square number, such as 64 or 256")
    player, num_steps, settings = contenders(args)[title]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = TwoTimeDiT(
        sample_size=side, in_channels=3, patch_size=2, num_layers=args.layers, num_attention_heads=args.heads,
        attention_head_dim=64, num_class_embeds=None,
    )  # fmt: skip
    teacher = NewTeacher(network.to(device))
    chosen = RCMSettings(max_rollout=max(args.num_steps), **settings)
    method = RCM(chosen, Parts(teacher, StudentSettings(), [], resolution=side)).to(device).train()
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    parameters = method.players()[player]
    optimiser = torch.optim.Adam(parameters, 1e-4)
    updates = dict.fromkeys(method.players(), num_steps - 1)
    iteration = iter(range(10**9))

    def step() -> None:
        i = next(iteration)
        batch = Batch(Draws(0, i, range(args.batch_size), device), images=images)
        method(player, batch, Progress(i, 10**9, updates), {})["loss"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in parameters)


def measured(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and MiB of every contender."""
    steps = {title: stepper(tokens, title, args) for title in contenders(args)}
    found = in_turns({title: step for title, (step, _) in steps.items()}, args.steps)
    ratios = {k: [a / b for a, b in zip(v, found[BASE], strict=True)] for k, v in found.items()}
    mib = {k: [memory(tokens, k, args) for _ in range(args.memory_runs)] for k in steps}
    return {
        "parameters": steps[BASE][1],
        "seconds": {k: quantiles(v) for k, v in found.items()},
        "time_ratio": {k: quantiles(v) for k, v in ratios.items() if k != BASE},
        "mib": {k: statistics.median(v) for k, v in mib.items()},
    }


def memory(tokens: int, title: str, args: argparse.Namespace) -> float:
    """MiB that the steps of one contender add to the peak of a process of its own."""
    words = ["--memory_of", tokens, title, "--batch_size", args.batch_size, "--layers", args.layers]
    words += ["--heads", args.heads, "--threads", args.threads, "--num_steps", *args.num_steps]
    return printed_number(__file__, *words)


def report(args: argparse.Namespace) -> dict[str, Any]:
    shared = ("num_steps", "batch_size", "steps", "layers", "heads", "threads")
    out: dict[str, Any] = {
        "environment": environment(ROOT),
        **{k: getattr(args, k) for k in shared},
        "tokens": {},
    }
    for tokens in args.tokens:
        row = out["tokens"][str(tokens)] = measured(tokens, args)
        print(as_text(tokens, row), flush=True)
    return out


def as_text(tokens: int, row: dict[str, Any]) -> str:
    lines = [
        f"{tokens} tokens, {row['parameters']:,} parameters",
        f"| step | ms | / {BASE} | MiB |",
        "|---|---|---|---|",
    ]
    for title, q in row["seconds"].items():
        ratio = three_quantiles(row["time_ratio"][title]) if title in row["time_ratio"] else "1"
        lines.append(f"| {title} | {three_quantiles(q, 1000)} | {ratio} | {row['mib'][title]:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 1024, 4096])
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 4], help="of the rollouts")
    parser.add_argument("--batch_size", type=int, default=4)
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
        tokens, title = args.memory_of
        print(added_mib(stepper(int(tokens), title, args)[0]))
        return 0
    result = report(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
