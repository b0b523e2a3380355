"""The front matter of a model card, which the hub reads: licence, base, data, task and scores."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...pipelines.export import Export
from ..config.run import DataSettings, RunConfig
from .card_code import restores, takes_prompt
from .licence import KEYS, base_model, licence_of
from .public_names import HUB_ID, public

DATASETS = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}
INHERITED = (*KEYS, "base_model", "base_model_relation", "datasets", "pipeline_tag")


def front_matter(config: RunConfig, export: Export, *, adapter: bool = False) -> str:
    """The head of a run's card, of its LoRA or of its pipeline; the teacher's licence holds for its students."""
    known: dict[str, Any] = {}
    if config.teacher is not None:
        known |= licence_of(config.teacher) | base_model(config.teacher)
    if "base_model" in known:
        known["base_model_relation"] = "adapter" if adapter else "finetune"
    known |= {"datasets": datasets_of(config.data), "pipeline_tag": task_of(export)}
    return head(known, config.method["name"], *(["lora"] if adapter else []))


def search_front_matter(student: Path, method: str) -> str:
    """The head of a found pipeline's card: what the student's says of licence, base and data holds for it."""
    card = student / "README.md"
    stated: dict[str, Any] = {}
    if card.is_file():
        stated = data_of(card.read_text())
    return head({k: stated[k] for k in INHERITED if k in stated}, method)


def head(known: Mapping[str, Any], *tags: str) -> str:
    """Front matter with `known` entries, those that are None left out."""
    data = ModelCardData(library_name="diffusers", tags=["fewstep", "few-step", *tags], **known)
    return f"---\n{data.to_yaml()}\n---\n"


def data_of(card: str) -> dict[str, Any]:
    """The entries of a card's front matter, {} where there are none or they cannot be read."""
    if not card.startswith("---"):
        return {}
    try:
        return dict(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except ValueError:
        return {}


def task_of(export: Export) -> str | None:
    """The hub's name of what the pipeline does; None for what makes no pictures."""
    if not export.sampling:
        return None
    if restores(export):
        return "image-to-image"
    return "text-to-image" if takes_prompt(export) else "unconditional-image-generation"


def datasets_of(data: DataSettings) -> list[str] | None:
    """The hub's name of the training data; None for a folder's, prompts, and data that the hub has not."""
    name = DATASETS.get(data.name, data.name)
    on_hub = "/" in name and re.fullmatch(HUB_ID, name) and not Path(data.name).exists()
    return [name] if on_hub else None


def with_results(card: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The card with the scores of a report's rows as its model-index, in place of earlier ones."""
    known = data_of(card)
    if not known or not rows:
        return card
    known.pop("model-index", None)
    results = results_of(rows, known.get("pipeline_tag") or "text-to-image")
    data = ModelCardData(**known, model_name=name, eval_results=results)
    text = ModelCard(card, ignore_metadata_errors=True).text
    return f"---\n{data.to_yaml()}\n---\n{text}"


def results_of(rows: Sequence[Mapping[str, Any]], task: str) -> list[EvalResult]:
    """Every score of a report's rows in the hub's terms; how it was measured stands in its name and arguments."""
    results = []
    for row in rows:
        steps = row.get("steps")
        called = "" if steps is None else f", {steps} step{'s' * (steps > 1)}"
        for score in row["scores"]:
            protocol = score["protocol"]
            place, named, split = str(protocol["reference"]).partition(",")[0].rpartition("/")
            data = public(place or split)
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=DATASETS.get(data, data),
                    dataset_name=data,
                    dataset_split=split if named else None,
                    metric_type=re.sub(r"\W+", "_", score["name"].lower()).strip("_"),
                    metric_name=f"{score['name']}{called}",
                    metric_value=score["value"],
                    metric_args={
                        "pictures": protocol["n_gen"],
                        "seeds": row["seeds"],
                        "protocol": score["protocol_id"],
                    },
                )
            )
    return results
