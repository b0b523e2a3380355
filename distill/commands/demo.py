"""`fewstep demo`: distil the embedded teacher, score teacher and student alike, show both."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...pipelines.export import Export, sampling_of
from ..catalog.configuration import fitted, load_config, with_overrides
from ..catalog.recipes import CONFIGS
from ..config.run import RunConfig
from ..config.third_party import quiet
from ..config.tree import read_yaml
from ..reports.evaluate import evaluate
from ..reports.pipeline_source import quantise
from ..reports.table import markdown_table, rows_of
from ..reports.trained_on import data_for, default_holdout
from ..teachers import EMBEDDED
from ..training.card_code import loading_lines
from ..training.grid import rows_image
from ..training.model_card import with_scores
from ..training.run_lock import locked
from ..training.runner import Runner
from ..writers import write_file

# Seconds on two cores of 2.4 GHz: a picture in a training step, one in an evaluation of the network, the rest
SECONDS_TRAINED, SECONDS_EVALUATION, BESIDE = 1.34 / 48, 0.002, 110
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
    many values; None for 3, and 1 where the teacher takes 50 steps.
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
    rows_of_models = rows_to_score(seeds)
    minutes = expected(None if runner.finished() else config, num_images, rows_of_models) / 60
    print(
        f"about {max(1, round(minutes))} min on two slow cores (2.4 GHz); Ctrl-C and the same command resume",
        flush=True,
    )
    if not runner.finished():
        print(f"1/3 distilling emoji-sd in {runner.config.max_train_steps} steps", flush=True)
        runner.train()
    print("2/3 scoring the teacher and the student on the same prompts and noise seeds", flush=True)
    teacher, student = EMBEDDED["emoji-sd"], run / "pipeline"
    data = data_for([str(student)], "emoji-sd")
    holdout, rows = default_holdout(data, data.split), []
    for name, steps, repeats in rows_of_models:
        folder = {"teacher": teacher, "student": student}[name]
        output = output_dir / f"{name}-{'-'.join(map(str, steps))}.json"
        report = evaluate(
            str(folder), data=data.name, split=data.split, holdout=holdout, data_options=data.options,
            num_images=num_images, steps=steps, seeds=repeats, output=output,
        )  # fmt: skip
        rows += rows_of(name, report)
    table = markdown_table(rows)
    print("3/3 drawing", flush=True)
    pictures = output_dir / "pictures.png"
    pipeline = save_pictures(teacher, student, pictures)
    write_file(output_dir / "comparison.md", table)
    own = [row for row in rows if row["model"] == "student"]
    with_scores(student, markdown_table(own), own)
    lines = loading_lines(Export(pipeline, sampling=sampling_of(student)), str(student))
    print(f"{time.perf_counter() - begun:.0f} seconds\n\n{table}")
    print(f"\npictures:   {pictures}\npipeline:   {student}\ncomparison: {output_dir / 'comparison.md'}\n")
    print(f"the student in plain diffusers:\n\n{lines}")
    return table


def rows_to_score(seeds: int | None) -> list[tuple[str, list[int], int]]:
    """Model, numbers of steps, and how many values of each."""
    return [
        ("teacher", [50], seeds or 1),
        ("teacher", [4, 2, 1], seeds or 3),
        ("student", [1, 2, 4], seeds or 3),
    ]


def expected(config: RunConfig | None, num_images: int, rows: Sequence[tuple[str, list[int], int]]) -> float:
    """Seconds on two cores of 2.4 GHz; config: what is still to be trained, None for nothing."""
    evaluations = sum(
        num_images * n * values * (1 + (name == "teacher")) for name, steps, values in rows for n in steps
    )
    trained = 0 if config is None else config.max_train_steps * config.train_batch_size
    return BESIDE + SECONDS_TRAINED * trained + SECONDS_EVALUATION * evaluations


def save_pictures(teacher: Path, student: Path, path: Path, captions: tuple[str, ...] = CAPTIONS) -> Any:
    """Teacher at 50, 2, 1 steps above the student at 1, 2, 4: the same captions and noise seeds in every row.

    Returns the student's pipeline.
    """
    rows: dict[str, Any] = {}
    pipeline: Any = None
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
    return pipeline
