"""Few-step sampling of a consistency function in TrigFlow, at times that a stock scheduler can express."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from ....pipelines.export import Export, in_float32
from ....pipelines.pipeline_trigflow import TrigFlowPipeline
from ....pipelines.scheduler_few_sigmas import FewSigmasScheduler
from ...diffusion.denoiser import Denoiser, DenoiserView
from ...diffusion.process import VP, RectifiedFlow, TrigFlow
from ...errors import UserError
from ...models.stock_schedulers import lcm_scheduler
from ...models.student import Student
from ...models.teacher import LatentTeacher
from ...settings import StudentSettings
from ..space import ClassLatentSpace, LatentSpace, Space


class TrigSampling:
    """x0 = f(x, t_i), x = cos(t_{i+1}) x0 + sin(t_{i+1}) fresh noise, over the first k of `times`.

    The network's own process says which scheduler that is: LCMScheduler at whole training steps for a
    variance-preserving network, FlowMatchEulerDiscreteScheduler with stochastic_sampling and explicit sigmas for
    straight paths (FewSigmasScheduler where the pipeline's call takes none), SCMScheduler in TrigFlowPipeline for
    TrigFlow's and EDM's own. Times are rounded to what it can
    express; those that are not below the first are left out.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float]):
        assert isinstance(denoiser.process, TrigFlow)
        self.process = denoiser.process
        self.own = denoiser.inner.process if isinstance(denoiser, DenoiserView) else denoiser.process
        self.kind = denoiser.inner.kind if isinstance(denoiser, DenoiserView) else denoiser.kind
        self.steps = [int(t + 1e-6) for t in self._own_times(times)] if self.whole else []
        rounded = self._times_of(self.steps) if self.whole else list(times)
        if not isinstance(self.own, VP | RectifiedFlow):
            rounded = [below_float32(t) for t in rounded]
        self.times = [t for i, t in enumerate(rounded) if i == 0 or t < rounded[0]]
        self.steps = self.steps[:1] + [k for k in self.steps[1:] if k < self.steps[0]]
        if any(a <= b for a, b in pairwise(self.times)):
            raise UserError(f"method.times: {list(times)} do not decrease; sort them from noise to data")

    @property
    def whole(self) -> bool:
        return isinstance(self.own, VP)

    def start(self, noise: Tensor, time: float) -> Tensor:
        """The state at `time` from unit noise, as the stock pipelines start: not scaled by their first sigma."""
        alpha, sigma = math.cos(time), self.process.sigma_data * math.sin(time)
        if isinstance(self.own, VP):
            return math.hypot(alpha, sigma) * noise
        if isinstance(self.own, RectifiedFlow):
            return (alpha + sigma) * noise
        return self.process.sigma_data * noise

    def calls(self) -> dict[str, dict[str, Any]]:
        """Call arguments per number of steps."""
        counts = range(1, len(self.times) + 1)
        if self.whole:
            return {str(n): {"timesteps": self.steps[:n]} for n in counts}
        if isinstance(self.own, RectifiedFlow):
            sigmas = self._own_times(self.times)
            return {str(n): {"sigmas": sigmas[:n]} for n in counts}
        return {str(n): {"timesteps": self.times[:n]} for n in counts}

    def scheduler(self) -> Any:
        if isinstance(self.own, VP):
            return lcm_scheduler(self.own, self.kind)
        if isinstance(self.own, RectifiedFlow):
            return FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
        return SCMScheduler(sigma_data=self.process.sigma_data)

    def export(self, student: Student, space: Space, settings: StudentSettings) -> Export:
        """The teacher's own pipeline with the student in its place, a LoRA for it, or TrigFlowPipeline.

        Guidance is in the weights, and off in their calls.
        """
        if isinstance(space, LatentSpace):
            return self._in_teachers_pipeline(student, space.teacher, settings)
        codec = space.codec if isinstance(space, ClassLatentSpace) else None
        vae = {} if codec is None else in_float32({"vae": codec.vae})
        prediction = "edm" if self.kind == "edm" else "trigflow"
        pipeline = TrigFlowPipeline(
            student.network, self.scheduler(), prediction=prediction, times=tuple(self.times), **vae
        )
        return Export(pipeline, sampling=self.calls())

    def _in_teachers_pipeline(
        self, student: Student, teacher: LatentTeacher, settings: StudentSettings
    ) -> Export:
        scheduler, calls = self.scheduler(), self.calls()
        if not teacher.family.takes_times:
            scheduler = FewSigmasScheduler(few_sigmas=tuple(self._own_times(self.times)))
            calls = {n: {"num_inference_steps": int(n)} for n in calls}
        own = {**teacher.family.unguided(), **teacher.call()}
        calls = {n: {**call, **own} for n, call in calls.items()}
        if not student.lora:
            return Export(teacher.assembled(student.network, scheduler=scheduler), sampling=calls)
        fused = teacher.assembled(student.fused(), scheduler=scheduler) if settings.export_fused else None
        adapter = teacher.adapter(student.lora_weights(), scheduler)
        return Export(fused, sampling=calls, adapter=adapter)

    def _own_times(self, times: Sequence[float]) -> list[float]:
        t = torch.tensor(list(times), dtype=torch.float64, device="cpu")
        return self.own.time_of(self.process.log_snr(t)).tolist()

    def _times_of(self, steps: Sequence[int]) -> list[float]:
        s = torch.tensor(list(steps), dtype=torch.float64, device="cpu")
        return self.process.time_of(self.own.log_snr(s)).tolist()


def below_float32(t: float) -> float:
    """The time as SCMScheduler holds it, and not above pi/2, which float32's nearest number is."""
    near = torch.tensor(t, dtype=torch.float32, device="cpu")
    return float(near if near.item() <= math.pi / 2 else near.nextafter(torch.zeros_like(near)))
