"""Checkpoints combined into a pipeline's network: in weight space, or as a LoRA on its teacher's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.run import RunConfig
from ..config.tree import read_yaml
from ..config.validation import validate
from ..errors import UserError
from ..models.teacher import load_pipeline, locate
from ..training.run_folder import CONFIG
from .checkpoint_set import CheckpointSet
from .settings import Space

NETWORKS = ("unet", "transformer")
DOWN, UP = ".lora_A.student.weight", ".lora_B.student.weight"


class WeightSpace:
    """The network of a pipeline from `folder`, whose weights `load` replaces by combinations of whole sets of them.

    At most two models are in memory: this one, and at `load(None)` its own weights, read again.
    """

    def __init__(self, pipeline: Any, folder: Path, checkpoints: CheckpointSet):
        self.folder, self.checkpoints = folder, checkpoints
        self.name = next(n for n in NETWORKS if getattr(pipeline, n, None) is not None)
        self.network = getattr(pipeline, self.name)
        self.raw = self.raw_names()

    def raw_names(self) -> dict[str, str]:
        """The network's parameters: the names of their raw weights."""
        prefix = network_prefix(self.checkpoints.names, [k for k, _ in self.network.named_parameters()])
        return {k: prefix + k for k, _ in self.network.named_parameters()}

    @torch.no_grad()
    def load(self, alpha: np.ndarray | None) -> None:
        """Put sum(alpha_i theta_i) into the network, tensor by tensor; None: its own weights again."""
        if alpha is None:
            kind = type(self.network)
            own = kind.from_pretrained(self.folder, subfolder=self.name, dtype=self.network.dtype)
            self.network.load_state_dict(own.state_dict())
            return
        state = self.network.state_dict()
        for name in self.raw:
            state[name].copy_(self.combined(name, alpha))

    def combined(self, name: str, alpha: Sequence[float] | np.ndarray) -> Tensor:
        """One of the network's parameters."""
        return self.checkpoints.combined(self.raw[name], list(alpha))


class LoRASpace(WeightSpace):
    """W = W_0 + scale (sum alpha_i B_i)(sum alpha_i A_i), "factors", or W_0 + scale sum alpha_i B_i A_i, "delta".

    W_0 are the teacher's weights. Averages of adapter files are the first, which has cross terms; the second has up to
    K times the rank and is merged into the weights. W_0 and the network are the two models in memory.
    """

    def __init__(self, pipeline: Any, folder: Path, checkpoints: CheckpointSet, factors: bool):
        config: RunConfig = validate(RunConfig, read_yaml(checkpoints.run / CONFIG))
        if config.student.kind != "lora" or config.teacher is None:
            raise UserError(f"method.space: {checkpoints.run} did not train a LoRA; use `space: weights`")
        self.factors = factors
        self.scale = config.student.lora_alpha / config.student.rank
        super().__init__(pipeline, folder, checkpoints)
        teacher = load_pipeline(locate(config.teacher.path))
        weights = getattr(teacher, self.name).float().state_dict()
        self.base = {name: weights[name] for name in self.raw}

    def raw_names(self) -> dict[str, str]:
        """The weights with an adapter: the names of its two factors, without their ends."""
        adapted = [n.removesuffix(DOWN) for n in self.checkpoints.names if n.endswith(DOWN)]
        parameters = {k.removesuffix(".weight") for k, _ in self.network.named_parameters()}
        inner = {n: next((n[i:] for i in starts(n) if n[i:] in parameters), None) for n in adapted}
        lost = [n for n, k in inner.items() if k is None]
        if lost or not adapted:
            raise UserError(
                f"student.path: raw weights {lost[:1]} fit no layer of {type(self.network).__name__}"
            )
        return {f"{k}.weight": n for n, k in inner.items()}

    def combined(self, name: str, alpha: Sequence[float] | np.ndarray) -> Tensor:
        weights = list(alpha)
        raw, base = self.raw[name], self.base[name]
        if self.factors:
            down, up = (self.checkpoints.combined(raw + end, weights) for end in (DOWN, UP))
            delta = product(up.double(), down.double())
        else:
            delta = torch.zeros(base.shape, dtype=torch.float64).flatten(1)
            for i, a in enumerate(weights):
                up, down = (self.checkpoints.tensor(i, raw + end).double() for end in (UP, DOWN))
                delta.add_(product(up, down), alpha=a)
        return (base.double() + self.scale * delta.view_as(base)).to(base.dtype)


def product(up: Tensor, down: Tensor) -> Tensor:
    """B A of a linear layer, or of a convolution (1x1 after one of the layer's kernel), as a matrix (O, I kh kw)."""
    return up.flatten(1) @ down.flatten(1)


def starts(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(i + 1 for i, c in enumerate(name) if c == ".")]


def network_prefix(names: Sequence[str], parameters: Sequence[str]) -> str:
    """What stands before the names of a network's parameters among `names`. Raises UserError if nothing fits."""
    there = set(names)
    found = [n.removesuffix(parameters[0]) for n in names if n.endswith(parameters[0])]
    whole = [p for p in found if all(p + k in there for k in parameters)]
    chosen = [p for p in whole if p.startswith("student.")] or whole
    if len(chosen) != 1:
        lora = any(n.endswith(DOWN) for n in names)
        remedy = "use `space: lora_factors` or `lora_delta`" if lora else "they are of another network"
        raise UserError(
            f"method.space: the raw weights are not the pipeline's {len(parameters)} parameters; {remedy}"
        )
    return chosen[0]


def open_space(space: Space, pipeline: Any, folder: Path, checkpoints: CheckpointSet) -> WeightSpace:
    if space == "weights":
        return WeightSpace(pipeline, folder, checkpoints)
    return LoRASpace(pipeline, folder, checkpoints, factors=space == "lora_factors")
