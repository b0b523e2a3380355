"""Frechet distance beside torchmetrics and torch-fidelity, and `evaluate` beside the same work by hand, in one run.

    python scripts/benchmark_metrics.py --output configs/emoji/results/benchmark_metrics.json

Both libraries get the same float32 features. Repeats are interleaved; times are medians with 20 and 80 % quantiles.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fewstep.distill.config.third_party import quiet
from fewstep.distill.metrics.extractor import extract
from fewstep.distill.metrics.features import make_extractor
from fewstep.distill.metrics.frechet import Moments, frechet_distance
from fewstep.distill.metrics.reference import captions_of, load_reference
from fewstep.distill.reports.evaluate import evaluate
from fewstep.distill.reports.pipeline_source import SEED_STRIDE, quantise
from fewstep.distill.teachers import EMBEDDED
from fewstep.distill.training.measure import environment, quantiles, seconds
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


class Given(torch.nn.Module):
    """Stands for an extractor where the features are at hand."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def features(n: int, d: int, seed: int) -> Tensor:
    """(n, d) float32, positive and correlated, with a falling spectrum."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) / torch.arange(1, d + 1) ** 0.5
    return (torch.randn(n, d, generator=draw) @ mixing / d**0.5 + 0.02 * seed).abs()


def ours(real: Tensor, generated: Tensor) -> float:
    return frechet_distance(Moments.of(real), Moments.of(generated))


def torchmetrics_distance(real: Tensor, generated: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Given(real.shape[1]))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def torch_fidelity_distance(real: Tensor, generated: Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(x) for x in (generated, real)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


LIBRARIES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "fewstep": ours,
    "torchmetrics": torchmetrics_distance,
    "torch-fidelity": torch_fidelity_distance,
}


def frechet(n: int, d: int, repeats: int) -> dict[str, Any]:
    real, generated = features(n, d, 1), features(n, d, 2)
    values = {name: f(real, generated) for name, f in LIBRARIES.items()}
    times: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for _ in range(repeats):
        for name, f in LIBRARIES.items():
            times[name].append(seconds(lambda f=f: f(real, generated)))
    own = quantiles(times["fewstep"])["median"]
    rows = {
        name: {
            "value": values[name],
            "relative_difference": values[name] / values["fewstep"] - 1,
            "seconds": quantiles(times[name]),
            "times_ours": quantiles(times[name])["median"] / own,
        }
        for name in LIBRARIES
    }
    return {"n": n, "d": d, "repeats": repeats, "libraries": rows}


def by_hand(pipe: Any, prompts: list[str], batch_size: int) -> float:
    """What `evaluate` does for one value: pictures of the pipeline, features, distance."""
    network = make_extractor("efflite0-128")
    parts = []
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        generators = [torch.Generator().manual_seed(i % SEED_STRIDE) for i in rows]
        images = pipe(
            prompts[rows.start : rows.stop], generator=generators, num_inference_steps=4,
            guidance_scale=3.0, output_type="pt",
        ).images  # fmt: skip
        parts.append(extract(network, quantise(images), batch_size))
    real = load_reference(network, "emoji", "train", 32)
    return real.kid(torch.cat(parts))


def whole(repeats: int, num_images: int, batch_size: int) -> dict[str, Any]:
    """Seconds of `evaluate` over the same by hand: teacher, 4 steps, warmed caches of the reference."""
    from diffusers import DiffusionPipeline

    folder = str(EMBEDDED["emoji-sd"])

    def hand() -> float:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        prompts = captions_of("emoji", "train")[:num_images]
        pipe([prompts[0]] * batch_size, num_inference_steps=1, guidance_scale=3.0, output_type="pt")
        return by_hand(pipe, prompts, batch_size)

    def tool() -> float:
        report = evaluate(
            folder, num_images=num_images, steps=[4], batch_size=batch_size, guidance_scale=3.0, device="cpu",
            progress=False, fresh=True,
        )  # fmt: skip
        return report["rows"][0]["scores"][0]["value"]

    values = {"by hand": hand(), "evaluate": tool()}
    pairs = []
    for i in range(repeats):
        first, second = (hand, tool) if i % 2 else (tool, hand)
        taken = {f.__name__: seconds(f) for f in (first, second)}
        pairs.append((taken["hand"], taken["tool"]))
    return {
        "num_images": num_images,
        "batch_size": batch_size,
        "repeats": repeats,
        "values": values,
        "seconds_by_hand": quantiles([h for h, _ in pairs]),
        "seconds_evaluate": quantiles([t for _, t in pairs]),
        "ratio": quantiles([t / h for h, t in pairs]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=128, help="of the evaluation; 0: leave it out")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet()
    report: dict[str, Any] = {"environment": environment(ROOT), "threads": torch.get_num_threads()}
    report["frechet"] = []
    for n in args.sizes:
        result = frechet(n, args.dim, args.repeats)
        report["frechet"].append(result)
        for name, row in result["libraries"].items():
            time, difference = row["seconds"]["median"], row["relative_difference"]
            print(
                f"N={n} d={args.dim} {name:14} {row['value']:.8f} ({difference:+.1e})  {time:.3f} s  "
                f"{row['times_ours']:.1f}x ours",
                flush=True,
            )
    if args.num_images:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["FEWSTEP_CACHE"] = cache
            report["evaluate"] = whole(max(args.repeats, 2), args.num_images, args.batch_size)
        ratio = report["evaluate"]["ratio"]
        print(f"evaluate over by hand: {ratio['median']:.3f} ({ratio['q20']:.3f} to {ratio['q80']:.3f})")
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
