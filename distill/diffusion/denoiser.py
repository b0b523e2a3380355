"""Any diffusers network behind one call, and its output seen as x0, eps, v or velocity."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .condition import Condition
from .process import EDM, NoiseProcess, TrigFlow, per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "edm", "velocity", "trigflow")


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
