"""Q-Sched (arXiv 2509.01624): schedulers with two scalars a step; one file for trust_remote_code=True."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ModelMixin,
    SchedulerMixin,
    TCDScheduler,
)
from diffusers.configuration_utils import register_to_config

__all__ = ["ModelMixin", "SchedulerMixin"]  # diffusers opens a module with these two names in it, no other


class QSchedMixin:
    """Before the base class's step i, the state is multiplied by c_x[i] and the network's output by c_eps[i].

    The network's input is not scaled, and both uses of its output, in x0 and in the noise added again, see the scaled
    one. None or ones: the base class, bit for bit. One number stands for all steps; otherwise there must be one a step.
    """

    upcast = False  # whether the base class takes its state to float32
    config: Any
    timesteps: Any
    step_index: Any
    _init_step_index: Any

    def coefficients(self, name: str) -> list[float]:
        """c_x or c_eps of every step of the current timesteps. Raises ValueError on another number of them."""
        values = self.config[name]
        steps = len(self.timesteps)
        values = [1.0] if values is None else values
        if len(values) not in (1, steps):
            raise ValueError(
                f"{name} has {len(values)} coefficients, but there are {steps} steps: sample with "
                f"{len(values)} steps, for which they were found, or give {name}=None"
            )
        return list(values) * (steps if len(values) == 1 else 1)

    def position(self, timestep: Any) -> int:
        """The index of this step."""
        if self.step_index is None:
            self._init_step_index(timestep)
        return self.step_index


def by_time(self: Any, timestep: Any) -> int:
    """`QSchedMixin.position` of a scheduler that does not count its steps."""
    where = self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)
    return int(where.nonzero()[0])


def q_sched(base: Any, **members: Any) -> Any:
    """The subclass of a scheduler class with `c_eps` and `c_x` in its configuration, beside the base's own keys.

    It repeats the signatures of the base: diffusers reads from them what a configuration holds and a call takes.
    members: what of QSchedMixin is otherwise for this base
    """
    signature = inspect.signature(base.__init__)
    extra = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Sequence[float] | None
        )
        for name in ("c_eps", "c_x")
    ]
    own = signature.replace(parameters=[*signature.parameters.values(), *extra])

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **{k: v for k, v in kwargs.items() if k not in ("c_eps", "c_x")})

    initialise.__signature__ = own  # type: ignore[attr-defined]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        base.set_timesteps(self, *args, **kwargs)
        for name in ("c_eps", "c_x"):
            self.coefficients(name)

    @functools.wraps(base.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        i = self.position(timestep)
        sample = sample.float() if self.upcast else sample
        x, output = self.coefficients("c_x")[i] * sample, self.coefficients("c_eps")[i] * model_output
        return base.step(self, output, timestep, x, *args, **kwargs)

    own_members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with the coefficients of QSchedMixin.",
        "__init__": register_to_config(initialise),
        "set_timesteps": set_timesteps,
        "step": step,
    }
    return type(f"QSched{base.__name__}", (QSchedMixin, base), {**own_members, **members})


QSchedTCDScheduler = q_sched(TCDScheduler)
QSchedLCMScheduler = q_sched(LCMScheduler)
QSchedCMStochasticIterativeScheduler = q_sched(CMStochasticIterativeScheduler)
QSchedEulerDiscreteScheduler = q_sched(EulerDiscreteScheduler, upcast=True)
QSchedEulerAncestralDiscreteScheduler = q_sched(EulerAncestralDiscreteScheduler, upcast=True)
QSchedFlowMatchEulerDiscreteScheduler = q_sched(FlowMatchEulerDiscreteScheduler, upcast=True)

QSchedDDIMScheduler = q_sched(DDIMScheduler, position=by_time)

BASES: dict[type, Any] = {
    TCDScheduler: QSchedTCDScheduler,
    LCMScheduler: QSchedLCMScheduler,
    CMStochasticIterativeScheduler: QSchedCMStochasticIterativeScheduler,
    EulerDiscreteScheduler: QSchedEulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler: QSchedEulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler: QSchedFlowMatchEulerDiscreteScheduler,
    DDIMScheduler: QSchedDDIMScheduler,
}
