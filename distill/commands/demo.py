"""`fewstep demo`: distil the embedded teacher, score teacher and student alike, show both."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ...pipelines.export import sampling_of
from ..catalog.configuration import fitted, load_config, with_overrides
from ..config.run import RunConfig
from ..config.third_party import quiet
from ..config.tree import read_yaml
from ..reports.evaluate import evaluate
from ..reports.pipeline_source import quantise
from ..reports.table import markdown_table, rows_of
from ..reports.trained_on import data_for, default_holdout
from ..teachers import EMBEDDED
from ..training.grid import rows_image
from ..training.model_card import with_scores
from ..training.run_lock import locked
from ..training.runner import Runner
from ..writers import write_file

CONFIGS = Path(__file__).parents[2] / "configs"
CAPTIONS = (
    "red apple", "grinning face", "rocket", "banana", "tiger face", "rose", "octopus", "cherries", "airplane", "owl",
    "watermelon", "frog face",  # the last two are held out
)  # fmt: skip


def run_demo(
    output_dir: Path,
    overrides: Sequence[str] = (),
    *,
    config: Path = CONFIGS / "emoji" / "demo.yaml",
    num_images: int = 100,
    seeds: int | None = None,
) -> str:
    """Writes comparison.md, pictures.png and the reports below output_dir; returns the table. Resumes.

    overrides: flags on top of `config`, which must distil emoji-sd. num_images, seeds: pictures in one value, and how
    many values; None for 3, and 1 where the teacher takes 50 and 8 steps.
    """
    quiet()
    ready = read_yaml(config)
    tree = fitted(with_overrides(ready, overrides), ready)
    student = load_config({**tree, "output_dir": str(output_dir / "student")})
    with locked(output_dir):
        return _run(output_dir, student, num_images, seeds)


def _run(output_dir: Path, config: RunConfig, num_images: int, seeds: int | None) -> str:
    begun = time.perf_counter()
    run = output_dir / "student"
    runner = Runner(config)
    if not runner.finished():
        print(f"1/3 distilling emoji-sd in {runner.config.max_train_steps} steps", flush=True)
        runner.train()
    print("2/3 scoring the teacher and the student on the same prompts and noise seeds", flush=True)
    teacher, student = EMBEDDED["emoji-sd"], run / "pipeline"
    data = data_for([str(student)], "emoji-sd")
    holdout, rows = default_holdout(data, data.split), []
    for name, folder, steps, repeats in (
        ("teacher", teacher, [50, 8], seeds or 1),
        ("teacher", teacher, [4, 2, 1], seeds or 3),
        ("student", student, [1, 2, 4], seeds or 3),
    ):
        output = output_dir / f"{name}-{'-'.join(map(str, steps))}.json"
        report = evaluate(
            str(folder), data=data.name, split=data.split, holdout=holdout, data_options=data.options,
            num_images=num_images, steps=steps, seeds=repeats, output=output,
        )  # fmt: skip
        rows += rows_of(name, report)
    table = markdown_table(rows)
    print("3/3 drawing", flush=True)
    save_pictures(teacher, student, output_dir / "pictures.png")
    write_file(output_dir / "comparison.md", table)
    own = [row for row in rows if row["model"] == "student"]
    with_scores(student, markdown_table(own), own)
    print(f"\n{table}")
    print(
        f"pictures:   {output_dir / 'pictures.png'}\npipeline:   {student}\ncomparison: {output_dir / 'comparison.md'}"
    )
    print(f"{time.perf_counter() - begun:.0f} seconds")
    return table


def save_pictures(teacher: Path, student: Path, path: Path, captions: tuple[str, ...] = CAPTIONS) -> None:
    """Teacher at 50, 2, 1 steps above the student at 1, 2, 4: the same captions and noise seeds in every row."""
    rows = {}
    for name, folder, steps in (("teacher", teacher, (50, 2, 1)), ("student", student, (1, 2, 4))):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        calls = sampling_of(folder)
        for n in steps:
            arguments = calls.get(str(n)) or {**calls["default"], "num_inference_steps": n}
            generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
            images = pipeline(list(captions), generator=generators, output_type="pt", **arguments).images
            rows[f"{name}, {n} step{'s' * (n > 1)}"] = quantise(images)
    rows_image(rows).save(path)
