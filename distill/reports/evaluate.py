"""Score a pipeline or a folder of pictures against real pictures; every number carries its protocol."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..errors import UserError
from ..methods.control.controls import Control
from ..protocols.table import get_standard
from ..scorers.by_name import make_scorer
from ..training.measure import PeakMemory
from ..writers import check_writable, write_report
from .generation import Generation, Made
from .judges import DataJudge, Judge, StandardJudge, inputs_for
from .opening import check_counts, open_source, place_of, setting_of
from .report import machine
from .scoring import condition_score, image_text_score


def evaluate(
    pipeline: str,
    *,
    data: str = "emoji",
    num_images: int,
    steps: Sequence[int],
    seeds: int = 1,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    extractor: str = "efflite0-128",
    split: str = "train",
    holdout: str | None = "holdout",
    output: Path | None = None,
    guidance_scale: float | None = None,
    data_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    fresh: bool = False,
    clip: str | None = None,
    protocol: str | None = None,
    control: Control | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores and seconds per image for each number of steps: the report, which is also written to `output`.

    pipeline            a diffusers pipeline folder or hub id, or the name of an embedded teacher; or a folder of
                        images: then no steps, 1 seed
    num_images, seeds   pictures in one value, of a folder a fixed random draw; values of disjoint noise, whose mean and
                        sd are reported
    split, holdout      reference of KID, FD and prompts; unseen real pictures, None where there are none
    device              None: cuda if there is one, else cpu
    guidance_scale      None: what sampling.json or the pipeline says
    data_options        further arguments of load_data
    clip                also an image-text score, by a name of `scorers.make_scorer`
    protocol            a named protocol in place of data, split, holdout and extractor
    control             what conditions are taken from the real pictures by; every pipeline is scored against them, one
                        with a ControlNet is called with them; None: what the pipeline itself names
    fresh               make and time all pictures again, whatever the cache holds
    trust_remote_code   run code that the pipeline brings; code of ours, byte for byte, runs without it

    A row's `steps` is what was asked for; its `nfe` the evaluations of the network per image, counted; its peak
    memory that of making the pictures.

    Features and timings are kept below $FEWSTEP_CACHE/features as long as the pipeline's files do not change: an
    interrupted call goes on, and an equal one is quick. Under torchrun or `accelerate launch` the processes share the
    pictures; the first scores them and writes the report, the others return {}.

    Picture i uses the caption or class label of reference row i (fixed random order, repeated if it is short), as
    the pipeline wants, and the noise seed seed_block * 1_000_000 + i. Seconds are the median over full batches of
    the pipeline call alone, below 5 batches after one of warm-up. Raises UserError for whatever the caller can mend.
    """
    check_counts(num_images, seeds, batch_size)
    if output is not None:
        check_writable(output)
    where, rank, processes = place_of(device)
    center_crop = bool((data_options or {}).get("center_crop", True))
    source = open_source(pipeline, where, trust_remote_code, center_crop)
    if protocol is not None and source.touched is not None:
        raise UserError(
            f"{source.touched}, and protocol {protocol} takes files as they are; make all square, upright and of one "
            "size"
        )
    calls = source.calls(steps, seeds, guidance_scale, num_images)
    judge: Judge
    with PartialState().main_process_first() if processes > 1 else nullcontext():
        if protocol is None:
            judge = DataJudge(data, split, holdout, extractor, where, batch_size, data_options)
        else:
            get_standard(protocol).check_count(num_images)
            judge = StandardJudge(protocol, where, batch_size, progress)
    source.quantise_by(judge.quantise, judge.quantisation)
    inputs = inputs_for(judge, source, num_images, control)
    if source.num_classes is not None and inputs.num_classes > source.num_classes:
        raise UserError(
            f"{pipeline}: knows {source.num_classes} classes, {protocol or data} has {inputs.num_classes}; give "
            "the data that it was trained on"
        )
    scorer, measure = make_scorer(clip) if clip is not None else (None, None)
    if scorer is not None and not any(inputs.captions):
        raise UserError(f"clip: {pipeline} has no captions to score pictures with; leave it out")
    generation = Generation(
        source,
        judge.network,
        crop=judge.crop,
        crop_rule=judge.crop_rule,
        check_side=judge.check_side,
        scorer=None if scorer is None else scorer.to(where),
        batch_size=batch_size,
        device=where,
        warm_up=min(calls.items(), key=lambda call: call[0] or 0)[1],
        rank=rank,
        num_processes=processes,
    )
    made: dict[int | None, list[Made]] = {n: [] for n in calls}
    with tqdm(total=len(calls) * seeds * num_images, unit="image", disable=not progress or rank > 0) as bar:
        for n, arguments in calls.items():
            bar.set_description("files" if n is None else f"{n} steps")
            for seed in range(seeds):
                made[n].append(generation.make(inputs, num_images, seed, arguments, bar, fresh=fresh))
    if rank > 0:
        return {}
    rows = []
    for n, arguments in calls.items():
        setting = setting_of(source, judge.network, num_images, inputs, made[n][0], judge.crop_rule)
        scores = judge.scores([m.features for m in made[n]], setting)
        if scorer is not None and measure is not None:
            cosines = [m.cosines for m in made[n] if m.cosines is not None]
            scores.append(image_text_score(cosines, scorer, measure, setting))
        if inputs.conditions is not None:
            errors = [m.errors for m in made[n] if m.errors is not None]
            rows_of = source.inputs_of(range(num_images))
            scores.append(condition_score(errors, inputs.conditions, rows_of, setting))
        row = {
            "steps": n,
            "nfe": made[n][0].nfe or None,
            "num_images": num_images,
            "seeds": seeds,
            "seconds_per_image": None if n is None else median(m.seconds for m in made[n]),
            "peak_memory": {
                "bytes": max((m.memory for m in made[n] if m.memory is not None), default=None),
                "measure": PeakMemory(where).measure,
            },
            "arguments": arguments,
            "scores": [s.to_json() for s in scores],
        }
        rows.append(row)
    report = {**source.describe(), "data": protocol or Path(data).name, **machine(where)}
    report |= {"batch_size": batch_size, **judge.record(), "rows": rows}
    if output is not None:
        write_report(report, output)
    return report
