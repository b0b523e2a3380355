"""Score a pipeline or a folder of pictures against real pictures; every number carries its protocol."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from .features import make_extractor
from .reference import load_reference, reference
from .report import check_writable, machine, peak_memory, write_report
from .scoring import score_all
from .sources import FolderSource, open_source

__all__ = ["caption_match", "evaluate", "real_floor", "reference"]


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
    """Scores and seconds per image for each number of steps, as the report that `output` (JSON) receives.

    pipeline  a diffusers pipeline folder or hub id; or a folder of images, then `steps` is empty, seeds 1
    num_images, seeds   pictures in one value; values, whose mean and sd are reported, from disjoint noise
    split, holdout      the reference of KID, FD and prompts; unseen real pictures, None if there are none

    Picture i uses the caption of row i of the reference (in its fixed random order, repeated if it is short)
    and the noise seed seed_block * 1_000_000 + i. Seconds are the median over full batches of the pipeline
    call alone, after one batch to warm up. Raises UserError for what the caller can mend.
    """
    _check_counts(num_images=num_images, seeds=seeds, batch_size=batch_size)
    if output is not None:
        check_writable(output)
    where = _device(device)
    source = open_source(pipeline, where)
    calls = _calls(source, steps, seeds, guidance_scale)
    if isinstance(source, FolderSource):
        source.require(num_images)
    network = make_extractor(extractor).to(where)
    size = _warm_up(source, list(calls.values())[0], min(batch_size, num_images))
    real, unseen = (
        load_reference(network, data, s, size, batch_size=batch_size, data_options=data_options) if s else None
        for s in (split, holdout)
    )
    assert real is not None
    captioned = source.conditioning == "caption"
    prompts = [real.captions[i % len(real.captions)] for i in range(num_images)] if captioned else []
    rows = []
    with tqdm(total=len(calls) * seeds * num_images, unit="image", disable=not progress) as bar:
        for nfe, arguments in calls.items():
            bar.set_description("image files" if nfe is None else f"{nfe} steps")
            runs, seconds = [], []
            for seed in range(seeds):
                batches = _batches(source, prompts, num_images, seed, arguments, batch_size)
                features, taken = _features(network, batches, batch_size, bar)
                runs.append(features)
                seconds += taken
            scores = score_all(runs, prompts, real, unseen, network, source, size)
            rows.append(
                {
                    "nfe": nfe,
                    "num_images": num_images,
                    "seeds": seeds,
                    "seconds_per_image": median(seconds) if seconds else None,
                    "arguments": arguments,
                    "scores": [s.to_json() for s in scores],
                }
            )
    report = {**source.describe(), "data": Path(data).name, **machine(where), "batch_size": batch_size}
    report |= {"peak_memory": peak_memory(where), "rows": rows}
    if output is not None:
        write_report(report, output)
    return report
