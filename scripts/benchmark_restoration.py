"""PSNR, feature distance and KID of restorers on degraded held-out pictures.

    python scripts/benchmark_restoration.py configs/emoji/interlcm.yaml --output runs/emoji/restoration

Degrades the pictures as the configuration of `interlcm` says, with a fixed seed for every row, and scores them, their
bicubic enlargement, the clean ones through the autoencoder (what no latent restorer can exceed), the configuration's
student alone from each intermediate state (img2img), and the restorer that it trained. Writes restoration.json,
restoration.md and restoration.png.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from fewstep.distill.catalog.configuration import load_config, with_overrides
from fewstep.distill.config.third_party import quiet
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.errors import UserError
from fewstep.distill.reports.restoration import as_markdown, benchmark
from fewstep.distill.training.grid import save_rows
from fewstep.distill.training.measure import environment
from fewstep.distill.writers import write_file, writing

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further --key.sub value pairs override the configuration.",
    )
    parser.add_argument("config", help="a configuration of interlcm")
    parser.add_argument("--restorer", nargs="*", help="runs or pipeline folders; default: the output_dir")
    parser.add_argument("--split", default="holdout")
    parser.add_argument(
        "--num_images", type=int, default=456, help="at most; default: emoji's whole hold-out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--extractor", default="efflite0-128", help="of KID")
    parser.add_argument(
        "--distance", default="efflite2", help="efflite0, efflite2, lpips: not the training's own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    args, overrides = parser.parse_known_args()
    quiet()
    try:
        config = load_config(with_overrides(read_yaml(args.config), overrides))
        report, pictures = benchmark(
            config, [config.output_dir] if args.restorer is None else args.restorer, split=args.split,
            num_images=args.num_images, seeds=args.seeds, batch_size=args.batch_size, extractor=args.extractor,
            distance=args.distance, device=torch.device(args.device),
        )  # fmt: skip
        args.output.mkdir(parents=True, exist_ok=True)
        write_file(
            args.output / "restoration.json",
            json.dumps({"environment": environment(ROOT), **report}, indent=2),
        )
        write_file(args.output / "restoration.md", as_markdown(report))
        with writing(args.output / "restoration.png"):
            save_rows(pictures, args.output / "restoration.png")
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
