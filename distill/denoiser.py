"""Any diffusers network behind one call, and its output seen as x0, eps, v or velocity."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.func import functional_call

from ..pipelines.transformer_two_time import TwoTimeDiT
from ..pipelines.unet_norms import NormedUNet2DConditionModel, NormedUNet2DModel
from .condition import Condition
from .errors import UserError
from .process import EDM, NoiseProcess, TrigFlow, per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "edm", "velocity", "trigflow")
ADDED_CONDITIONS = (
    "text_embeds",
    "time_ids",
    "image_embeds",
)  # SDXL's and an IP-Adapter's, one nested argument


@dataclass(frozen=True)
class Prediction:
    """A network output at (x_t, t); every view is computed from it in float32 or better.

    output (B, ...) of the network; kind: what the network was trained to give (diffusers' prediction_type); "velocity":
    dx_t/dt; "edm": F of x0 = c_skip x + c_out F (arXiv 2206.00364, eq. 7), in the EDM process alone; "trigflow": F of
    dx_t/dt = sigma_data F (arXiv 2410.11081), in TrigFlow alone. Of a two-time network, u(x_t, r, t) is `velocity`, the
    mean one between r and t. noise: eps where it is known beside an x0 of kind "sample".
    """

    output: Tensor
    x_t: Tensor
    t: Tensor
    process: NoiseProcess
    kind: str
    features: dict[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None

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
        if self.kind in ("velocity", "trigflow"):
            a_dot, s_dot = self._slopes()
            return (s_dot * self.x_t - s * self.velocity) / (a * s_dot - s * a_dot)
        if self.kind == "edm":
            assert isinstance(self.process, EDM)
            c_skip, c_out, _ = self.process.scalings(self.t)
            return per_sample(c_skip, self.x_t) * self.x_t + per_sample(c_out, self.x_t) * self.output
        return self.output

    @property
    def eps(self) -> Tensor:
        a, s = self._coefficients()
        if self.noise is not None:
            return self.noise
        if self.kind == "sample":
            return (self.x_t - a * self.x0) / s
        if self.kind == "edm":  # (x - x0) / sigma, written without the division
            assert isinstance(self.process, EDM)
            c_in = self.process.scalings(self.t)[2]
            rest = per_sample(self.process.sigma(self.t) * c_in.square(), self.x_t)
            return rest * self.x_t - per_sample(self.process.sigma_data * c_in, self.x_t) * self.output
        if self.kind == "v_prediction":
            return (s * self.x_t + a * self.output) / (a * a + s * s)
        if self.kind in ("velocity", "trigflow"):
            a_dot, s_dot = self._slopes()
            return (a * self.velocity - a_dot * self.x_t) / (a * s_dot - s * a_dot)
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
        if self.kind == "trigflow":
            assert isinstance(self.process, TrigFlow)
            return self.process.sigma_data * self.output
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
        assert kind != "trigflow" or isinstance(process, TrigFlow)
        self.network, self.process, self.kind = network, process, kind

    @abstractmethod
    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        """The network's own positional and keyword arguments."""

    def state(self, output: Tensor, x_t: Tensor) -> Tensor:
        """The network's output in the layout of x_t."""
        return output

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and time as the network was trained to see them.

        c_in x and 250 ln sigma for "edm", x / sigma_data and t for "trigflow", else what is given.

        250 ln sigma is EDM's c_noise times 1,000, what diffusers' CMStochasticIterativeScheduler feeds.
        """
        if self.kind == "trigflow":
            assert isinstance(self.process, TrigFlow)
            return x_t / self.process.sigma_data, t
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
        seen = self.state(output[0], x_t).to(x_t.dtype)
        return Prediction(seen, x_t, t, self.process, self.kind, kept)


def _keeper(kept: dict[str, Tensor], name: str):
    def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep


def nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """Added conditions under added_cond_kwargs, which diffusers' U-Net wants, image_embeds (B, 1, D) as a list with the
    one of its one IP-Adapter; the others as they are."""
    added = {k: arguments[k] for k in ADDED_CONDITIONS if k in arguments}
    if "image_embeds" in added:
        added["image_embeds"] = [added["image_embeds"]]
    flat = {k: v for k, v in arguments.items() if k not in added}
    return {**flat, "added_cond_kwargs": added} if added else flat


class UNet2DConditionDenoiser(Denoiser):
    """Stable Diffusion's calling convention: (sample, timestep, encoder_hidden_states=..., ...).

    Of SDXL, text_embeds and time_ids are entries of the condition like any other.
    """

    network: UNet2DConditionModel

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError("a UNet2DConditionModel has one time; r needs a two-time student")
        dtype = self.network.dtype
        told = nested(condition.to(dtype).arguments)
        return (x_t.to(dtype), t.to(torch.float32)), {**told, "return_dict": False}


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
        return {"class_labels": h, **nested(condition.to(self.network.dtype).arguments)}


class TwoTimeDiTDenoiser(TwoTimeDenoiser):
    """(hidden_states, timestep, span, class_labels)."""

    def told(self, h: Tensor, condition: Condition) -> dict:
        return {"span": h, **condition.arguments}


class TransformerDenoiser(Denoiser):
    """Keyword arguments alone: hidden_states, timestep and the condition's entries. t is that of RectifiedFlow.

    `time_scale`: what the network is told of t in [0, 1].
    """

    network: Any
    time_scale = 1000.0

    def call(self, x_t: Tensor, t: Tensor, r: Tensor | None, condition: Condition) -> tuple[tuple, dict]:
        if r is not None:
            raise ValueError(f"a {type(self.network).__name__} has one time; r needs a two-time student")
        dtype = self.network.dtype
        states, positions = self.tokens(x_t.to(dtype), condition)
        time = (self.time_scale * t).to(torch.float32)
        told = {**condition.to(dtype).arguments, **positions, "return_dict": False}
        return (), {"hidden_states": states, "timestep": time, **told}

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t in the network's layout, and the arguments that tell where its parts stand."""
        return x_t, {}


class SD3Denoiser(TransformerDenoiser):
    """SD3Transformer2DModel (arXiv 2403.03206): encoder_hidden_states (B, L, D), pooled_projections (B, P)."""


class FluxDenoiser(TransformerDenoiser):
    """FluxTransformer2DModel: as SD3's and, of a guidance-distilled one, guidance (B,).

    States are (B, C, h, w) with even h and w; the network sees 2 x 2 patches as tokens (B, h w / 4, 4 C).
    """

    time_scale = 1.0

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        patches = x_t.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
        grid = torch.cartesian_prod(*(torch.arange(float(n), device=x_t.device) for n in (rows, columns)))
        length = condition.arguments["encoder_hidden_states"].shape[1]
        positions = {
            "img_ids": torch.nn.functional.pad(grid.view(-1, 2), (1, 0)),
            "txt_ids": torch.zeros(length, 3, device=x_t.device),
        }
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), positions

    def state(self, output: Tensor, x_t: Tensor) -> Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        patches = output.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class WanDenoiser(TransformerDenoiser):
    """WanTransformer3DModel: encoder_hidden_states (B, L, D). States are (B, C, T, h, w), or (B, C, h, w) of pictures,
    which the network sees as videos of one frame."""

    def tokens(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        return x_t.unsqueeze(2) if x_t.ndim == 4 else x_t, {}

    def state(self, output: Tensor, x_t: Tensor) -> Tensor:
        return output.reshape(x_t.shape)


ADAPTERS: dict[type[nn.Module], type[Denoiser]] = {
    UNet2DConditionModel: UNet2DConditionDenoiser,
    UNet2DModel: UNet2DDenoiser,
    NormedUNet2DConditionModel: UNet2DConditionDenoiser,
    NormedUNet2DModel: UNet2DDenoiser,
    TwoTimeDiT: TwoTimeDiTDenoiser,
    SD3Transformer2DModel: SD3Denoiser,
    FluxTransformer2DModel: FluxDenoiser,
    WanTransformer3DModel: WanDenoiser,
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

    Data and noise of the inner prediction are those of the outer state. At high noise eps follows from x0, at low noise
    it is the inner one, so that the velocity is divided by no coefficient that vanishes. Ratios beyond the inner
    process's ends are cut as `NoiseProcess.map_to` says.
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
        a, s = (per_sample(c(t), x_t) for c in (self.process.alpha, self.process.sigma))
        eps = torch.where(s > a, (x_t - a * seen.x0) / torch.where(s > a, s, 1.0), seen.eps)
        return Prediction(seen.x0, x_t, t, self.process, self.kind, seen.features, noise=eps)


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
