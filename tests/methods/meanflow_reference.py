"""An analytic network, exact mean velocities of Gaussian data, and MeanFlow on either with given numbers."""

from typing import Any

import torch
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.meanflow.meanflow import MeanFlow
from fewstep.distill.methods.meanflow.settings import MeanFlowSettings
from fewstep.distill.methods.space import PixelSpace
from fewstep.distill.models.network_adapters import TwoTimeDenoiser
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor, nn

TINY = {"_class_name": "TwoTimeDiT", "sample_size": 4, "in_channels": 3, "num_class_embeds": None}
TINY |= {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}

A, B, C, D = 0.5, -0.3, 0.2, 0.1
X0 = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64)
EPS = torch.tensor([[-1.0, 0.5], [2.0, 0.0]], dtype=torch.float64)
T = torch.tensor([0.8, 0.6], dtype=torch.float64)
R = torch.tensor([0.3, 0.6], dtype=torch.float64)


class Analytic(nn.Module):
    """net(z, t, h) = a z + b t z + c h + d z^2."""

    def __init__(self) -> None:
        super().__init__()
        self.abcd = nn.Parameter(torch.tensor([A, B, C, D], dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor]:
        a, b, c, d = self.abcd
        column = [-1, *[1] * (z.ndim - 1)]
        return (a * z + b * t.view(column) * z + c * h.view(column) + d * z * z,)


class Gaussian:
    """Data N(m, s^2): z_r = (1 - r) m + (S_r / S_t) (z - (1 - t) m), S_t^2 = (1 - t)^2 s^2 + t^2."""

    def __init__(self, m: float | Tensor, s: float | Tensor):
        self.m = torch.as_tensor(m, dtype=torch.float64)
        self.s = torch.as_tensor(s, dtype=torch.float64)

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.s**2 + t**2).sqrt()

    def moved(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (1 - r) * self.m + self.spread(r) / self.spread(t) * (z - (1 - t) * self.m)

    def mean_velocity(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (z - self.moved(z, t, r)) / (t - r)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        return -self.m + (t - (1 - t) * self.s**2) / self.spread(t) ** 2 * (z - (1 - t) * self.m)


class ExactMean(nn.Module):
    """The mean velocity of Gaussian data as a network of (z, t, h), with a free factor and offset."""

    def __init__(self, m: float, s: float):
        super().__init__()
        self.field = Gaussian(m, s)
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor]:
        t, h = (a.view(-1, *[1] * (z.ndim - 1)) for a in (t, h))
        point = h.abs() < 1e-9
        spans = self.field.mean_velocity(z, t, t - torch.where(point, torch.ones_like(h), h))
        u = torch.where(point, self.field.velocity(z, t), spans)
        return (self.factor * u + self.offset,)


def embedded(t: Tensor) -> Tensor:
    """cos and sin of 2 pi... 1, 2, 4, 8 times t, (B, 8)."""
    angles = t.float()[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class MLP(nn.Module):
    """128-wide, three layers, of z in two dimensions and cos/sin(1, 2, 4, 8) of t and h."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(18, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor]:
        flat = torch.cat([z.flatten(1), embedded(t), embedded(h)], dim=1)
        return (self.layers(flat).view(z.shape),)


class Direct(TwoTimeDenoiser):
    """network(z, t, h), in whatever precision it is called."""

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return (x_t, t.to(x_t.dtype), (t - (t if r is None else r)).to(x_t.dtype)), condition.arguments

    def told(self, h: Tensor, condition: Condition) -> dict:
        raise AssertionError


class Given(PixelSpace):
    """Samples are the batch's images, of any shape, told the batch's condition."""

    def __init__(self) -> None:
        super().__init__((3, 4, 4))

    def samples(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        return batch.images


class Known(Draws):
    """The noise is given; uniform numbers come from a list."""

    def __init__(self, eps: Tensor, uniforms: list[Tensor] | None = None):
        super().__init__(0, 0, range(len(eps)))
        self.eps, self.uniforms = eps, uniforms or []

    def normal(self, shape: Any) -> Tensor:
        assert tuple(shape) == tuple(self.eps.shape[1:])
        return self.eps

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.uniforms.pop(0)


def meanflow_on(network: nn.Module, spans: tuple[Tensor, Tensor] | None = None, **settings: Any) -> MeanFlow:
    """MeanFlow that trains `network`(z, t, h) on the images of its batches, at given (r, t) or its own."""
    parts = Parts(None, StudentSettings(init="scratch", network=TINY), [], resolution=4)
    method = MeanFlow(MeanFlowSettings(), parts)
    method.settings = MeanFlowSettings(**{"condition_dropout": 0.0, "derivative": "math", **settings})
    method.space = Given()
    method.student.denoiser = method.denoiser = Direct(network, method.process, "velocity")
    if spans is not None:
        method.spans = lambda draws: spans  # type: ignore[method-assign]
    return method


def run(method: MeanFlow, x0: Tensor, draws: Draws, condition: Condition | None = None, at: int = 0) -> Any:
    return method(
        "student", Batch(draws, images=x0, condition=condition), Progress(at, 10, {"student": at}), {}
    )
