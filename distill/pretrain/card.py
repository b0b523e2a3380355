"""The model card of a teacher that was trained here: what it scores, beside what real pictures score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

from ...pipelines.export import Export, sampling_of
from ..config.run import DataSettings
from ..data.sources import load_data
from ..metrics.protocol import Score
from ..reports.anchors import caption_match, real_floor
from ..reports.evaluate import evaluate
from ..reports.table import markdown_table, rows_of
from ..reports.trained_on import DEFAULTS, Data, default_holdout
from ..training.card_code import loading_lines
from ..training.model_card import markdown
from ..training.public_names import data_line, published
from ..writers import write_file, write_report

STEPS, NUM_IMAGES, LEAST_IMAGES = 50, 500, 8
PIXEL_STEPS, PIXEL_IMAGES = (1, 2, 4, 18), 10_000

HEAD = """---
library_name: diffusers
license: apache-2.0
tags: [fewstep, text-to-image]
---
# emoji-sd

A tiny Stable Diffusion ({parameters:.1f} M parameters, float16) that draws 32 px emoji from their names. It is the
embedded teacher of fewstep: small enough for two CPU cores, and loaded by stock diffusers.

```python
import torch
import yaml
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}", dtype=torch.float32)
image = pipe("red apple", guidance_scale={guidance}, num_inference_steps=50).images[0]
```

Trained by `scripts/train_teacher.py configs/emoji/teacher.yaml` on the training split ({train} names in two styles):
Noto emoji (Apache-2.0) and Twemoji (CC-BY 4.0, Twitter and other contributors). It was told one in ten pictures without
their caption. Names of the other splits were never shown to it. A set this small is largely memorised: see the
nearest-neighbour ratio.

"""

PIXEL_HEAD = """---
library_name: diffusers
license: apache-2.0
tags: [fewstep, class-conditional]
---
# fashion-edm

A class-conditional diffusion model ({parameters:.2f} M parameters, float16, grey) of Fashion-MNIST at 32 px (28 px with
a border of 2), preconditioned and trained as EDM (arXiv 2206.00364): the embedded pixel teacher of fewstep. Diffusers
loads it with the one file of code in this folder.

```python
import torch
import yaml
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}", dtype=torch.float32, trust_remote_code=True)
sneakers = pipe(class_labels=7, generator=torch.Generator().manual_seed(0)).images  # 18 steps of Heun
```

Trained by `scripts/train_teacher.py configs/fashion/teacher.yaml` on the 60,000 training pictures of Fashion-MNIST
(MIT, Zalando SE). Classes 0 to 9: {classes}.

"""


OWN_HEAD = """---
{front}---
# {name}

A {kind} of {parameters:.1f} M parameters, trained by fewstep on {data}.

```python
{lines}```

"""


def write_own_card(
    folder: Path,
    name: str,
    data: DataSettings,
    *,
    license: str = "other",
    steps: Sequence[int],
    num_images: int = NUM_IMAGES,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Score a teacher of one's own to what it was trained on; README.md and report.json go into `folder`.

    The data's hold-out is scored too where there is one. num_images: at most, and no more than the data have rows.
    Returns the report's rows.
    """
    own_data = Data.of({k: getattr(data, k) for k in ("name", *DEFAULTS)}, data.split)  # type: ignore[arg-type]
    own = any(folder.glob("*.py"))
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=own)
    captions = load_data(data.name, split=data.split, resolution=1, **own_data.options).captions
    report = evaluate(
        str(folder), data=data.name, split=data.split, holdout=default_holdout(own_data, data.split),
        num_images=min(num_images, max(LEAST_IMAGES, len(captions))), steps=steps, data_options=own_data.options,
        device=device,
    )  # fmt: skip
    write_report(report, folder / "report.json")
    parts = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    call = {**sampling_of(folder).get("default", {}), "num_inference_steps": max(steps)}
    export = Export(pipeline, sampling={"default": call})
    prompt = next((c for c in captions if c.strip()), "")
    front = {"library_name": "diffusers", "license": license, "tags": ["fewstep"]}
    text = OWN_HEAD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        kind=type(pipeline).__name__,
        parameters=sum(p.numel() for m in parts for p in m.parameters()) / 1e6,
        data=data_line(published(data)),
        lines=loading_lines(export, folder.name, own=own, options=", dtype=torch.float32", prompt=prompt),
    )
    write_file(folder / "README.md", text + markdown_table(rows_of(name, report)))
    return report["rows"]


def write_pixel_card(
    folder: Path,
    *,
    steps: Sequence[int] = PIXEL_STEPS,
    num_images: int = PIXEL_IMAGES,
    data: str = "fashion-mnist",
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Score a pixel teacher by Heun's steps to the test split; README.md and report.json are written into `folder`.

    Returns the report's rows: KID, FD, precision, recall, density and coverage of class-conditional pictures.
    """
    report = evaluate(
        str(folder), data=data, split="test", holdout=None, num_images=num_images, steps=steps, device=device
    )
    write_report(report, folder / "report.json")
    unet = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).unet
    text = PIXEL_HEAD.format(
        parameters=sum(p.numel() for p in unet.parameters()) / 1e6,
        folder=folder.name,
        classes=", ".join(load_data(data, split="test", resolution=32).classes),
    )
    write_file(folder / "README.md", text + markdown_table(rows_of(folder.name, report)))
    return report["rows"]


def write_card(
    folder: Path, *, num_images: int = NUM_IMAGES, device: str | None = None
) -> list[tuple[str, str]]:
    """Score the teacher in `folder` at 50 steps and write README.md and report.json into it; returns the table.

    Rows: KID to both splits, FD, the real/real floor of the same extractor, the nearest-neighbour distance ratio
    against real/real, and the share of captions whose picture is nearer to its own caption's than to another's.
    """
    report = evaluate(str(folder), num_images=num_images, steps=[STEPS], device=device)
    scores = [Score.from_json(s) for s in report["rows"][0]["scores"]]
    shares = [caption_match(str(folder), steps=STEPS, split=s, device=device) for s in ("train", "holdout")]
    size = scores[0].protocol.image_size
    floor = real_floor(image_size=size, device=device)
    report |= {"floor": [s.to_json() for s in floor], "caption_match": [s.to_json() for s in shares]}
    write_report(report, folder / "report.json")
    rows = [(f"teacher, {STEPS} steps: {s.name} to {s.protocol.reference}", show(s)) for s in scores]
    rows += [(f"{s.protocol.seed_rule}: {s.name} to {s.protocol.reference}", show(s)) for s in floor]
    rows += [(f"caption match, all names of {s.protocol.reference}", show(s)) for s in shares]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    text = HEAD.format(
        parameters=sum(p.numel() for m in parts for p in m.parameters()) / 1e6,
        folder=folder.name,
        guidance=sampling_of(folder)["default"]["guidance_scale"],
        train=shares[0].protocol.n_gen,
    )
    note = f"\n{num_images} pictures, one seed each; KID is unbiased and not multiplied by 1000.\n"
    write_file(folder / "README.md", text + markdown(("what", "value"), rows) + note)
    return rows


def show(score: Score) -> str:
    text = f"{score.value:.4f}"
    return f"{text} ({score.interval[0]:.3f} to {score.interval[1]:.3f})" if score.interval else text
