"""The configuration of a search: what it needs and training does not."""

from typing import Any, Literal

from pydantic import Field

from ..settings import COUNTS, settings


@settings
class StudentFolder:
    """The student that is searched on.

    path       a pipeline folder, the folder of a run that exported one, or a hub id
    lora       added to its weights: a file, or FILE of a hub repository as owner/name/FILE
    scheduler  in place of its own: a class of diffusers, from the same configuration with trailing timesteps
    """

    path: str
    lora: str | None = None
    scheduler: str | None = None


@settings
class SearchDataSettings:
    """The prompts or classes of the search, and the pictures of its metric.

    name            data set, as of a training
    split           part that the search sees; the report must use another
    image_column    column of the pictures
    caption_column  column of the captions
    center_crop     the middle square of a picture; false: the whole picture, squeezed into a square
    """

    name: str
    split: str = "reward"
    image_column: str = "image"
    caption_column: str = "text"
    center_crop: bool = True


@settings
class FitnessSettings:
    """What a search maximises, of pictures from the same noise and prompts for every candidate.

    kind        jaq: text + weight * quality (arXiv 2509.01624); kid: minus the KID to data.split
    text        a scorer of pictures with their captions: lite0-minilm, hpsv2, pickscore or MODEL:TAG of open_clip
    log_text    the logarithm of the text score in its place
    quality     realism, of the `neighbours`-th neighbour in `extractor`'s features, or a scorer
    weight      weight of the quality
    extractor   network of the picture features, of realism and KID
    neighbours  which neighbour's distance counts in realism
    """

    kind: Literal["jaq", "kid"] = "jaq"
    text: str = "lite0-minilm"
    log_text: bool = False
    quality: str = "realism"
    weight: float = Field(2.0, ge=0, le=COUNTS)
    extractor: str = "efflite0-128"
    neighbours: int = Field(3, ge=1, le=1000)


@settings
class SearchReportSettings:
    """Scores of the winner and its rivals, as of `fewstep evaluate`, on other prompts and noise than the search's.

    name        other data than the search's; null for the same
    split       split of the real pictures and the prompts
    holdout     split of unseen real pictures; null for none
    num_images  pictures in one value
    seeds       values, each of other noise
    clip        also an image-text score, as of `fewstep evaluate --clip`
    """

    name: str | None = None
    split: str = "train"
    holdout: str | None = "holdout"
    num_images: int = Field(500, ge=2, le=1_000_000)
    seeds: int = Field(3, ge=1, le=1000)
    clip: str | None = None


@settings
class SearchConfig:
    """A search without gradients, among candidates of each thing searched; nothing is trained.

    run:
    output_dir         folder of the search: configuration, log, the exported pipelines
    steps              network steps, a key of the student's sampling.json; what is found holds for them alone
    guidance_scale     guidance of the pictures; null for the student's own
    max_candidates     most candidates of each thing searched
    num_images         pictures of a candidate
    finalists          best candidates that are scored again
    final_images       pictures of a finalist, of other noise
    batch_size         pictures made at once
    seed               seed of noise and candidates
    trust_remote_code  run code that the student's folder brings; ours runs anyway

    student:
    student  what is searched on

    data:
    data  prompts and pictures of the search

    fitness:
    fitness  what is maximised

    report:
    report  scores of the winner on other data; null for none

    method:
    method  how candidates are made; `fewstep methods` lists them
    """

    output_dir: str
    method: Any
    student: StudentFolder
    data: SearchDataSettings
    steps: int = Field(ge=1, le=1000)
    fitness: FitnessSettings = Field(default_factory=FitnessSettings)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    max_candidates: int = Field(100, ge=1, le=1_000_000)
    num_images: int = Field(128, ge=2, le=1_000_000)
    finalists: int = Field(5, ge=1, le=1_000_000)
    final_images: int = Field(256, ge=2, le=1_000_000)
    batch_size: int = Field(64, ge=1, le=65536)
    seed: int = Field(0, ge=0, lt=1000)
    trust_remote_code: bool = False
    report: SearchReportSettings | None = Field(default_factory=SearchReportSettings)
