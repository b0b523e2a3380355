"""The configuration of a search: what it needs and training does not."""

from typing import Any, Literal

from pydantic import Field

from ..settings import COUNTS, settings


@settings
class StudentFolder:
    """path: a pipeline folder, the folder of a run that exported one, or a hub id.

    lora       added to its weights: a file, or FILE of a hub repository as "owner/name/FILE"
    scheduler  in place of its own: a class of diffusers, from the same configuration with trailing timesteps
    """

    path: str
    lora: str | None = None
    scheduler: str | None = None


@settings
class SearchDataSettings:
    """The prompts or classes of the search, and the pictures of its metric: a split that the report does not use."""

    name: str
    split: str = "reward"
    image_column: str = "image"
    caption_column: str = "text"
    center_crop: bool = True


@settings
class FitnessSettings:
    """What a search maximises, of pictures from the same noise and prompts for every candidate.

    kind       jaq: text + weight * quality (arXiv 2509.01624); kid: minus the KID to data.split
    text       a scorer of pictures with their captions, by a name of `make_scorer`; log_text: its logarithm instead
    quality    "realism", of the `neighbours`-th neighbour in `extractor`'s features, or a scorer
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
    """Scores of the winner and of what it is compared with, by `fewstep evaluate`: other prompts and noise than the
    search's. name: other data than the search's, null for the same."""

    name: str | None = None
    split: str = "train"
    holdout: str | None = "holdout"
    num_images: int = Field(500, ge=2, le=1_000_000)
    seeds: int = Field(3, ge=1, le=1000)
    clip: str | None = None


@settings
class SearchConfig:
    """A search without gradients, among `max_candidates` of each thing searched; nothing is trained.

    steps          network evaluations, a key of the student's sampling.json; what is found holds for them alone
    num_images     pictures of a candidate; the best `finalists` are scored again on `final_images` of other noise
    report         null for none
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
