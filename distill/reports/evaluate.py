"""Score a pipeline or a folder of pictures against real pictures; every number carries its protocol."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..errors import UserError, first_line
from ..methods.control.controls import Control
from ..metrics.extractor import Extractor
from ..metrics.features import make_extractor
from ..metrics.neighbours import match_share
from ..metrics.protocol import Score
from ..metrics.reference import captions_of, load_reference, reference
from ..protocols.table import get_standard
from ..scorers.by_name import make_scorer
from ..teachers import EMBEDDED
from ..training.measure import PeakMemory
from ..writers import check_writable, write_report
from .folder_source import FolderSource
from .generation import Generation, Made
from .inputs import Inputs
from .judges import DataJudge, Judge, StandardJudge, inputs_for
from .pipeline_source import SEED_STRIDE, PipelineSource
from .report import machine
from .scoring import Setting, condition_score, image_text_score
from .source import Source
from .trained_on import check_place

__all__ = ["caption_match", "evaluate", "open_source", "real_floor", "reference"]


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
    _check_counts(num_images, seeds, batch_size)
    if output is not None:
        check_writable(output)
    where, rank, processes = _place(device)
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
        setting = _setting(source, judge.network, num_images, inputs, made[n][0], judge.crop_rule)
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


def caption_match(
    pipeline: str,
    *,
    steps: int,
    data: str = "emoji",
    split: str = "holdout",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    extractor: str = "efflite0-128",
    guidance_scale: float | None = None,
    data_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Score:
    """Share of a split's captions whose picture is nearer to its own caption's than to another's.

    Arguments as in `evaluate`. One picture a caption; caption i of the split's fixed random order has the
    noise seed i. The interval is the Clopper-Pearson 95 % one. Raises UserError if the pipeline
    or the data have no captions.
    """
    _check_counts(2, 1, batch_size)
    where = choose_device(device)
    source = open_source(pipeline, where, trust_remote_code)
    ((_, arguments),) = source.calls([steps], 1, guidance_scale, 2).items()
    if source.conditioning != "caption":
        raise UserError(f"{pipeline}: takes no prompts, so its pictures have no captions to match")
    network = make_extractor(extractor).to(where)
    prompts = list(dict.fromkeys(captions_of(data, split, data_options)))
    if len(prompts) < 2:
        raise UserError(f"data {data}: split {split!r} has no captions to tell apart; set its caption_column")
    generation = Generation(source, network, batch_size=batch_size, device=where, warm_up=arguments)
    with tqdm(total=len(prompts), unit="image", disable=not progress) as bar:
        made = generation.make(Inputs.of_captions(prompts), len(prompts), 0, arguments, bar)
    real = load_reference(network, data, split, made.side, batch_size=batch_size, data_options=data_options)
    share = match_share(made.features, prompts, real.features, real.captions)
    setting = _setting(source, network, len(prompts), Inputs.of_captions(prompts), made)
    return setting.score("caption match", real, [share.value], share.interval)


def real_floor(
    *,
    image_size: int,
    data: str = "emoji",
    split: str = "train",
    holdout: str = "holdout",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    extractor: str = "efflite0-128",
    data_options: Mapping[str, Any] | None = None,
) -> list[Score]:
    """What real pictures score: KID and FD of the hold-out to the training split, and of two halves of it.

    `image_size` is the side in pixels at which the data are read. FD depends on the number of pictures, which
    the protocol of each score states.
    """
    _check_counts(2, 1, batch_size)
    network = make_extractor(extractor).to(choose_device(device))
    train, unseen = (
        load_reference(network, data, s, image_size, batch_size=batch_size, data_options=data_options)
        for s in (split, holdout)
    )
    half = len(train.features) // 2
    if half < 2:
        raise UserError(f"data {data}: split {split!r} has {len(train.features)} pictures; two halves need 4")
    first = replace(train, name=f"{train.name}, first half", features=train.features[:half])
    out = []
    for real, features, name in (
        (train, unseen.features, unseen.name),
        (first, train.features[half:], f"{train.name}, second half"),
    ):
        rule = f"real pictures of {name}"
        setting = Setting(network, len(features), Inputs(), rule, "uint8, real pictures", image_size)
        out.append(setting.score("KID", real, [real.kid(features)]))
        out.append(setting.score("FD", real, [real.frechet(features)]))
    return out


def open_source(
    pipeline: str, device: torch.device, trust_remote_code: bool = False, center_crop: bool = True
) -> Source:
    """An embedded teacher, a pipeline folder, a folder of images or a hub id; of pipelines also `PIPELINE+LORA`, with
    the LoRA of a file in the weights. `center_crop`: how a folder's images become squares, as of load_data. Raises
    UserError if it is none."""
    check_place(pipeline)
    lora = None
    if not Path(pipeline).exists() and "+" in pipeline:
        pipeline, _, lora = pipeline.partition("+")
    path = EMBEDDED.get(pipeline, Path(pipeline))
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return PipelineSource(str(path), device, lora=lora, trust_remote_code=trust_remote_code)
        if (path / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{path}: this is a run folder; give {path / 'pipeline'}")
        if lora is not None:
            raise UserError(f"{pipeline}+{lora}: a folder of images takes no LoRA; give a pipeline")
        return FolderSource(path, center_crop)
    return PipelineSource(pipeline, device, lora=lora, trust_remote_code=trust_remote_code)


def _setting(
    source: Source, network: Extractor, n_gen: int, inputs: Inputs, made: Made, crop_rule: str = "none"
) -> Setting:
    grey = "; grey repeated to RGB" if made.grey else ""
    crop = "" if crop_rule == "none" else f"; crop: {crop_rule}"
    rule = source.quantisation + grey + crop
    return Setting(network, n_gen, inputs, source.seed_rule, rule, made.side)


def _check_counts(num_images: int, seeds: int, batch_size: int) -> None:
    if not 2 <= num_images <= SEED_STRIDE:
        raise UserError(f"num_images: {num_images}; give 2 to {SEED_STRIDE}")
    for name, value in (("seeds", seeds), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")


def _place(device: torch.device | str | None) -> tuple[torch.device, int, int]:
    """The device, rank and number of processes; one process for each device under a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose_device(device), 0, 1
    state = PartialState(cpu=device is not None and torch.device(device).type == "cpu")
    return state.device, state.process_index, state.num_processes


def choose_device(device: torch.device | str | None) -> torch.device:
    """None: cuda if there is one, else cpu. Raises UserError for one that cannot be used here."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device}: not usable here ({first_line(error)}); leave it out or use cpu"
        ) from None
    return where
