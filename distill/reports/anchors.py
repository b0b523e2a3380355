"""Beside the scores of a model: what real pictures score, and whether pictures are those of their captions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import UserError
from ..metrics.features import make_extractor
from ..metrics.neighbours import match_share
from ..metrics.protocol import Score
from ..metrics.reference import captions_of, load_reference
from .generation import Generation
from .inputs import Inputs
from .opening import check_counts, choose_device, open_source, setting_of
from .scoring import Setting


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
    check_counts(2, 1, batch_size)
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
    setting = setting_of(source, network, len(prompts), Inputs.of_captions(prompts), made)
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
    check_counts(2, 1, batch_size)
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
