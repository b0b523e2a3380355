"""What the tests of latent consistency training share: tiny real networks, methods, batches and a second formula."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.consistency_training.lct import LCT
from fewstep.distill.methods.consistency_training.settings import LCTSettings
from fewstep.distill.models.codec import Autoencoder
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts
from torch import Tensor

from .ict_parts import CAPTIONS, CLASSES, GREY, latent_teacher

PLAIN: dict[str, Any] = {**GREY, "in_channels": 4, "out_channels": 4}
CLASSED = {**PLAIN, "num_class_embeds": len(CLASSES)}
DIT = {
    "_class_name": "TwoTimeDiT", "sample_size": 8, "in_channels": 4, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 8, "num_class_embeds": len(CLASSES),
}  # fmt: skip


def lct(
    folder: Path,
    *,
    network: dict[str, Any] | None = PLAIN,
    norm: Any = "non_scaling",
    dropout: float | None = None,
    measured: bool = True,
    student: dict[str, Any] | None = None,
    **settings: Any,
) -> LCT:
    """In the tiny pipeline's latents: told nothing or classes; with network None, its texts."""
    teacher = latent_teacher(folder)
    classed = network is not None and network.get("num_class_embeds")
    parts = Parts(
        teacher if network is None else None,
        StudentSettings(**{"init": "scratch", "network": network, "norm": norm, "dropout": dropout, **(student or {})}),
        [],
        CLASSES if classed else (),
        16,
        vae=None if network is None else Autoencoder(teacher.vae, str(folder)),
    )  # fmt: skip
    method = LCT(LCTSettings(**settings), parts)
    if measured:
        method.prepare(Cached())  # type: ignore[arg-type]
    method.train()
    return method


class Cached:
    """40 posteriors as the latent cache gives them, (n, 8, 8, 8): every element with a mean and spread of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        offset, width = torch.randn(2, 1, 4, 8, 8, generator=generator)
        mean = 3 * offset + width.exp() * torch.randn(40, 4, 8, 8, generator=generator)
        self.posteriors = torch.cat([mean, torch.randn(40, 4, 8, 8, generator=generator) - 2], dim=1)

    def __len__(self) -> int:
        return len(self.posteriors)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.posteriors[list(rows)]


def lct_batch(method: LCT, rows: range = range(6), iteration: int = 0) -> Batch:
    chosen = list(rows)
    condition = None
    if "labels" in method.needs:
        condition = Condition({"class_labels": torch.tensor(chosen) % len(CLASSES)}, {})
    if "prompts" in method.needs:
        condition = method.parts.need_latent_teacher().condition([CAPTIONS[i] for i in chosen])
    return Batch(
        Draws(5, iteration, rows), latents=Cached()[chosen], condition=condition,
        captions=[CAPTIONS[i % len(CAPTIONS)] for i in chosen],
    )  # fmt: skip


# A second implementation of the parts that iCT has not, from the formulas, in numpy.

SCALES = {
    11: 0.03456, 21: 0.01363532, 41: 0.00614442, 81: 0.00276883, 161: 0.00124770, 321: 0.00056225, 641: 0.00025336,
}  # fmt: skip


def statistics() -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (4, 8, 8) of latents times 0.18215."""
    mean, logvar = np.split(Cached().posteriors.double().numpy(), 2, axis=1)
    return 0.18215 * mean.mean(0), 0.18215 * np.sqrt(mean.var(0) + np.exp(logvar).mean(0))
