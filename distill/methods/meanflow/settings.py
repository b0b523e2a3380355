"""Settings of MeanFlow."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Derivative, Idle, MethodSettings, NeedsTeacher, Paper, settings

Dispersion = Literal["infonce_l2", "mp1"]


SpanLaw = Literal["sorted", "separate"]


MEANFLOW_PAPER = Paper(
    "Mean Flows for One-step Generative Modeling",
    "Geng, Zhengyang",
    "2505.13447",
)


@settings
class MeanFlowSettings(MethodSettings):
    """Defaults are the official ImageNet ones without guidance.

    source             of the velocity: data and noise, or the teacher
    target             over r < t: by the derivative (MeanFlow), `alpha_target` or `split_target`, which need none
    tangent            of the derivative: that velocity, or the student's own u(z, t, t) (improved MeanFlow)
    alpha_*            `annealed_alpha` by the share of the run: alpha_start, alpha_end, alpha_gamma, alpha_clip;
                       rows with r < t weigh alpha
    target_clip        bound of alpha_target's values, none unless given
    span_law, ratio    `draw_spans` of r <= t; ratio: share of rows with r < t
    p_mean, p_std      of logit t and r; r_mean, r_std: of logit r under span_law separate
    omega, kappa       guided velocity omega v + (1 - omega - kappa) u(z, t, t | none) + kappa u(z, t, t | y) where
                       guidance_start <= t <= guidance_end; from a teacher, omega is its guidance scale
    condition_dropout  share of rows trained without their condition, at r < t too (source data)
    loss               l2: `adaptive` of the summed squares; opt_grad: `unit_step`
    norm_p, norm_c     of either; per_element: they see the mean of the squares (l2), a gradient over sqrt(D) (opt_grad)
    tangent_warmup     steps over which the derivative's weight grows from 0 to 1
    derivative         back end of `total_derivative`; derivative_step: of finite_difference
    dispersive         regulariser on the outputs of the modules dispersive_blocks, summed: weight, tau
    """

    source: Literal["data", "teacher"] = "data"
    target: Literal["derivative", "alpha_flow", "split"] = "derivative"
    tangent: Literal["velocity", "student"] = "velocity"
    alpha_start: float = Field(0.0, ge=0, lt=1)
    alpha_end: float = Field(1.0, gt=0, le=1)
    alpha_gamma: float = Field(25.0, gt=0)
    alpha_clip: float = Field(0.005, ge=0, lt=0.5)
    target_clip: float | None = Field(None, gt=0)
    span_law: SpanLaw = "sorted"
    ratio: float = Field(0.25, ge=0, le=1)
    p_mean: float = -0.4
    p_std: float = Field(1.0, gt=0)
    r_mean: float | None = None
    r_std: float | None = Field(None, gt=0)
    omega: float = Field(1.0, gt=0)
    kappa: float = Field(0.0, ge=0, lt=1)
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1)
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    loss: Literal["l2", "opt_grad"] = "l2"
    norm_p: float = Field(1.0, ge=0)
    norm_c: float = Field(0.01, gt=0)
    per_element: bool = False
    tangent_warmup: int = Field(0, ge=0)
    derivative: Derivative = "kernel"
    derivative_step: float = Field(5e-3, gt=0)
    dispersive: Literal["none"] | Dispersion = "none"
    dispersive_weight: float = Field(0.5, gt=0)
    dispersive_tau: float = Field(1.0, gt=0)
    dispersive_blocks: tuple[str, ...] = ()

    label: ClassVar[str] = "MeanFlow"
    papers: ClassVar[tuple[Paper, ...]] = (MEANFLOW_PAPER,)
    needs_teacher: ClassVar[NeedsTeacher] = "to_start"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.derivative_step", "method.derivative", only=("finite_difference",)),
        Idle("method.condition_dropout", "method.source", only=("data",)),
        Idle("method.dispersive_weight method.dispersive_tau", "method.dispersive", values=("none",)),
        Idle(
            "method.guidance_start method.guidance_end",
            "method.omega",
            values=(1,),
            where=("method.kappa", 0),
        ),
        Idle("method.norm_c", "method.norm_p", values=(0,)),
        Idle("method.tangent_warmup", "max_train_steps", longer=True),
    )
