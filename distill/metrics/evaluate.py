"""Score a pipeline or a folder of pictures against real pictures; every number carries its protocol."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from .features import Extractor, extract, make_extractor
from .folder_source import FolderSource
from .neighbours import match_share
from .pipeline_source import SEED_STRIDE, PipelineSource
from .protocol import Score
from .reference import load_reference, reference
from .report import check_writable, machine, peak_memory, write_report
from .scoring import Setting, score_all
from .source import Source, first_line

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
) -> dict[str, Any]:
    """Scores and seconds per image for each number of steps: the report, which is also written to `output`.

    pipeline            a diffusers pipeline folder or hub id; or a folder of images: then no steps, 1 seed
    num_images, seeds   pictures in one value; values of disjoint noise, whose mean and sd are reported
    split, holdout      reference of KID, FD and prompts; unseen real pictures, None where there are none
    device              None: cuda if there is one, else cpu
    guidance_scale      None: what sampling.json or the pipeline says
    data_options        further arguments of load_data

    Picture i uses the caption of reference row i (fixed random order, repeated if it is short) and the noise
    seed seed_block * 1_000_000 + i. Seconds are the median over full batches of the pipeline call alone,
    after one batch of warm-up. Raises UserError for whatever the caller can mend.
    """
    _check_counts(num_images, seeds, batch_size)
    if output is not None:
        check_writable(output)
    where = _device(device)
    source = open_source(pipeline, where)
    calls = source.calls(steps, seeds, guidance_scale)
    network = make_extractor(extractor).to(where)
    fewest = min(calls.items(), key=lambda call: call[0] or 0)[1]
    size = source.warm_up(fewest, min(batch_size, num_images))
    train = load_reference(network, data, split, size, batch_size=batch_size, data_options=data_options)
    unseen = None
    if holdout is not None:
        unseen = load_reference(
            network, data, holdout, size, batch_size=batch_size, data_options=data_options
        )
    captioned = source.conditioning == "caption"
    prompts = [train.captions[i % len(train.captions)] for i in range(num_images)] if captioned else []
    setting = _setting(source, network, num_images, prompts, size)
    rows = []
    with tqdm(total=len(calls) * seeds * num_images, unit="image", disable=not progress) as bar:
        for nfe, arguments in calls.items():
            bar.set_description("files" if nfe is None else f"{nfe} steps")
            runs, seconds = [], []
            for seed in range(seeds):
                batches = source.batches(prompts, num_images, seed, arguments, batch_size)
                features, taken = _features(network, batches, batch_size, bar)
                runs.append(features)
                seconds += taken
            rows.append(
                {
                    "nfe": nfe,
                    "num_images": num_images,
                    "seeds": seeds,
                    "seconds_per_image": None if nfe is None else median(seconds),
                    "arguments": arguments,
                    "scores": [s.to_json() for s in score_all(runs, train, unseen, setting)],
                }
            )
    report = {**source.describe(), "data": Path(data).name, **machine(where), "batch_size": batch_size}
    report |= {"peak_memory": peak_memory(where), "rows": rows}
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
) -> Score:
    """Share of a split's captions whose picture is nearer to its own caption's than to another's.

    Arguments as in `evaluate`. One picture a caption; caption i of the split's fixed random order has the
    noise seed i. The interval is the Clopper-Pearson 95 % one. Raises UserError if the pipeline
    or the data have no captions.
    """
    _check_counts(2, 1, batch_size)
    where = _device(device)
    source = open_source(pipeline, where)
    ((_, arguments),) = source.calls([steps], 1, guidance_scale).items()
    if source.conditioning != "caption":
        raise UserError(f"{pipeline}: takes no prompts, so its pictures have no captions to match")
    network = make_extractor(extractor).to(where)
    size = source.warm_up(arguments, 1)
    real = load_reference(network, data, split, size, batch_size=batch_size, data_options=data_options)
    if not real.captioned:
        raise UserError(f"data {data}: split {split!r} has no captions to tell apart; set its caption_column")
    prompts = list(dict.fromkeys(real.captions))
    with tqdm(total=len(prompts), unit="image", disable=not progress) as bar:
        batches = source.batches(prompts, len(prompts), 0, arguments, batch_size)
        features, _ = _features(network, batches, batch_size, bar)
    share = match_share(features, prompts, real.features, real.captions)
    setting = _setting(source, network, len(prompts), prompts, size)
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
    network = make_extractor(extractor).to(_device(device))
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
        setting = Setting(network, len(features), (), "none", rule, "uint8, real pictures", image_size)
        out.append(setting.score("KID", real, [real.kid(features)]))
        out.append(setting.score("FD", real, [real.frechet(features)]))
    return out


def open_source(pipeline: str, device: torch.device) -> Source:
    """A pipeline folder, a folder of images or a hub id. Raises UserError if it is none of them."""
    path = Path(pipeline)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return PipelineSource(pipeline, device)
        if (path / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{path}: this is a run folder; give {path / 'pipeline'}")
        return FolderSource(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", pipeline):
        raise UserError(f"{pipeline}: no such folder; give a pipeline folder, a folder of images or a hub id")
    return PipelineSource(pipeline, device)


def _features(
    network: Extractor, batches: Iterable[tuple[Tensor, float]], batch_size: int, bar: tqdm
) -> tuple[Tensor, list[float]]:
    """Features (N, D), and the seconds per image of each batch as large as the first."""
    parts: list[Tensor] = []
    seconds = []
    for images, taken in batches:
        parts.append(extract(network, images, batch_size))
        if len(images) == len(parts[0]):
            seconds.append(taken / len(images))
        bar.update(len(images))
    return torch.cat(parts), seconds


def _setting(
    source: Source, network: Extractor, n_gen: int, prompts: Sequence[str], image_size: int
) -> Setting:
    return Setting(
        network, n_gen, prompts, source.conditioning, source.seed_rule, source.quantisation, image_size
    )


def _check_counts(num_images: int, seeds: int, batch_size: int) -> None:
    if not 2 <= num_images <= SEED_STRIDE:
        raise UserError(f"num_images: {num_images}; give 2 to {SEED_STRIDE}")
    for name, value in (("seeds", seeds), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")


def _device(device: torch.device | str | None) -> torch.device:
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device}: not usable here ({first_line(error)}); leave it out or use cpu"
        ) from None
    return where
