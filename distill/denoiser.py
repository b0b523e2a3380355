"""Any diffusers network behind one call, and its output seen as x0, eps, v or velocity."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.func import functional_call

from ..pipelines.transformer_two_time import TwoTimeDiT
from ..pipelines.unet_norms import NormedUNet2DConditionModel, NormedUNet2DModel
from .condition import Condition
from .errors import UserError
from .process import EDM, NoiseProcess, per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "edm", "velocity")


@dataclass(frozen=True)
class Prediction:
    """A network output at (x_t, t); every view is computed from it in float32 or better.

    output (B, ...) of the network; kind: what the network was trained to give (diffusers' prediction_type); "velocity":
    dx_t/dt; "edm": F of x0 = c_skip x + c_out F (arXiv 2206.00364, eq. 7), in the EDM process alone. Of a two-time
    network, u(x_t, r, t) is `velocity`, the mean one between r and t.
    """

    output: Tensor
    x_t: Tensor
    t: Tensor
    process: NoiseProcess
    kind: str
    features: dict[str, Tensor] = field(default_factory=dict)

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        x = self.x_t
        return per_sample(self.process.alpha(self.t), x), per_sample(self.process.sigma(self.t), x)

    def _slopes(self) -> tuple[Tensor, Tensor]:
        x = self.x_t
        return per_sample(self.process.alpha_dot(self.t), x), per_sample(self.process.sigma_dot(self.t), x)

    @property
    def x0(self) -> Tensor:
        a, s = self._coefficients()
        if self.kind == "epsilon":
            return (self.x_t - s * self.output) / a
        if self.kind == "v_prediction":
            return (a * self.x_t - s * self.output) / (a * a + s * s)
        if self.kind == "velocity":
            a_dot, s_dot = self._slopes()
            return (s_dot * self.x_t - s * self.output) / (a * s_dot - s * a_dot)
        if self.kind == "edm":
            assert isinstance(self.process, EDM)
            c_skip, c_out, _ = self.process.scalings(self.t)
            return per_sample(c_skip, self.x_t) * self.x_t + per_sample(c_out, self.x_t) * self.output
        return self.output

    @property
    def eps(self) -> Tensor:
        a, s = self._coefficients()
        if self.kind in ("sample", "edm"):
            return (self.x_t - a * self.x0) / s
        if self.kind == "v_prediction":
            return (s * self.x_t + a * self.output) / (a * a + s * s)
        if self.kind == "velocity":
            a_dot, s_dot = self._slopes()
            return (a * self.output - a_dot * self.x_t) / (a * s_dot - s * a_dot)
        return self.output

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (arXiv 2202.00512)."""
        a, s = self._coefficients()
        return a * self.eps - s * self.x0

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt = alpha' x0 + sigma' eps in the process's own time."""
        if self.kind == "velocity":
            return self.output
        a_dot, s_dot = self._slopes()
        return a_dot * self.x0 + s_dot * self.eps


class Denoiser(nn.Module):
    """`(x_t, t, condition, *, r=None, features=()) -> Prediction`.

    x_t (B, C, ...), t (B,) float in the process's time, r (B,) the second time of two-time networks. `features`
    names submodules whose outputs come back in Prediction.features. `weights` replaces parameters by name for this
    call alone: a moving target is evaluated without a network of its own.
    """

    def __init__(self, network: nn.Module, process: NoiseProcess, kind: str):
        super().__init__()
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {kind!r} is not one of {', '.join(PREDICTION_TYPES)}")
        assert kind != "edm" or isinstance(process, EDM)
        self.network, self.process, self.kind = network, process, kind

    @abstractmethod
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        """The network's own positional and keyword arguments."""

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and time as the network was trained to see them: c_in x and 250 ln sigma for "edm", else as they are.

        250 ln sigma is EDM's c_noise times 1,000, what diffusers' CMStochasticIterativeScheduler feeds.
        """
        if self.kind != "edm":
            return x_t, t
        assert isinstance(self.process, EDM)
        return per_sample(self.process.scalings(t)[2], x_t) * x_t, 250 * t.double().log()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        features: Sequence[str] = (),
        weights: dict[str, Tensor] | None = None,
    ) -> Prediction:
        args, kwargs = self.call(*self.network_input(x_t, t), r, condition)
        kept: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in features:
                hook = self.network.get_submodule(name).register_forward_hook(_keeper(kept, name))
                stack.callback(hook.remove)
            if weights is None:
                output = self.network(*args, **kwargs)
            else:
                output = functional_call(self.network, weights, args, kwargs)
        return Prediction(output[0].to(x_t.dtype), x_t, t, self.process, self.kind, kept)


def _keeper(kept: dict[str, Tensor], name: str):
    def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep


class UNet2DConditionDenoiser(Denoiser):
    """Stable Diffusion's calling convention: (sample, timestep, encoder_hidden_states=..., ...)."""

    network: UNet2DConditionModel

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError("a UNet2DConditionModel has one time; r needs a two-time student")
        dtype = self.network.dtype
        return (x_t.to(dtype), t.to(torch.float32)), {**condition.to(dtype).arguments, "return_dict": False}


class UNet2DDenoiser(Denoiser):
    """The unconditional or class-conditional convention: (sample, timestep, class_labels=...)."""

    network: UNet2DModel

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError("a UNet2DModel has one time; r needs a two-time student")
        return (x_t.to(self.network.dtype), t.to(torch.float32)), {
            **condition.arguments,
            "return_dict": False,
        }


class TwoTimeDenoiser(Denoiser):
    """A network that is told h, the share (t - r) of its process's range, beside t; without r it is 0."""

    network: Any

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        low, high = self.process.t_range
        h = (t - (t if r is None else r)) / (high - low)
        told = self.told(h.to(torch.float32), condition)
        return (x_t.to(self.network.dtype), t.to(torch.float32)), told | {"return_dict": False}

    @abstractmethod
    def told(self, h: Tensor, condition: Condition) -> dict:
        """h (B,) and the condition under the names of the network's arguments."""


class TwoTimeUNetDenoiser(TwoTimeDenoiser):
    """class_embed_type "timestep" of diffusers' UNets: an embedding of class_labels, added to that of t, takes h."""

    def told(self, h: Tensor, condition: Condition) -> dict:
        return {"class_labels": h, **condition.to(self.network.dtype).arguments}


class TwoTimeDiTDenoiser(TwoTimeDenoiser):
    """(hidden_states, timestep, span, class_labels)."""

    def told(self, h: Tensor, condition: Condition) -> dict:
        return {"span": h, **condition.arguments}


ADAPTERS: dict[type[nn.Module], type[Denoiser]] = {
    UNet2DConditionModel: UNet2DConditionDenoiser,
    UNet2DModel: UNet2DDenoiser,
    NormedUNet2DConditionModel: UNet2DConditionDenoiser,
    NormedUNet2DModel: UNet2DDenoiser,
    TwoTimeDiT: TwoTimeDiTDenoiser,
}


def takes_span(network: Any) -> bool:
    """Whether the network embeds a second time."""
    return isinstance(network, TwoTimeDiT) or network.config.get("class_embed_type") == "timestep"


def denoiser_of(network: nn.Module, process: NoiseProcess, kind: str) -> Denoiser:
    """The network behind the adapter of its calling convention. Raises UserError for a class without one."""
    adapter = ADAPTERS.get(type(network))
    if adapter in (UNet2DConditionDenoiser, UNet2DDenoiser) and takes_span(network):
        adapter = TwoTimeUNetDenoiser
    if adapter is None:
        known = ", ".join(c.__name__ for c in ADAPTERS)
        raise UserError(f"network: no adapter for a {type(network).__name__}; there are some for {known}")
    return adapter(network, process, kind)


class DenoiserView(Denoiser):
    """`inner` as a denoiser of another process: state and times are mapped by equal signal-to-noise ratio.

    Ratios beyond the inner process's ends are cut as `NoiseProcess.map_to` says.
    """

    def __init__(self, inner: Denoiser, process: NoiseProcess):
        nn.Module.__init__(self)
        self.inner, self.process, self.kind = inner, process, "sample"

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        return self.inner.network

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        return self.inner.call(*self.inner.network_input(x_t, t), r, condition)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        features: Sequence[str] = (),
        weights: dict[str, Tensor] | None = None,
    ) -> Prediction:
        z, s = self.process.map_to(self.inner.process, x_t, t)
        if r is not None:
            r = self.inner.process.time_of(self.process.log_snr(r))
        seen = self.inner(z, s, condition, r=r, features=features, weights=weights)
        return Prediction(seen.x0, x_t, t, self.process, self.kind, seen.features)


def reach(denoiser: Denoiser) -> tuple[float, float]:
    """The times between which a denoiser has been trained: of a view, those that its inner process has an own for."""
    if not isinstance(denoiser, DenoiserView):
        return denoiser.process.t_range
    ends = torch.tensor(
        denoiser.inner.process.t_range, dtype=torch.float64, device="cpu"
    )  # also in a dry run
    low, high = denoiser.process.time_of(denoiser.inner.process.log_snr(ends)).tolist()
    return low, high


def seen_in(denoiser: Denoiser, process: NoiseProcess) -> Denoiser:
    """The denoiser itself where `process` is its own, else a view of it."""
    return denoiser if denoiser.process is process else DenoiserView(denoiser, process)
