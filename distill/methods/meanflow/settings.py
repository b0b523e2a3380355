"""Settings of MeanFlow."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Derivative, Idle, MethodSettings, NeedsTeacher, Origin, Paper, Variant, settings

Dispersion = Literal["infonce_l2", "mp1"]


SpanLaw = Literal["sorted", "separate"]


MEANFLOW_PAPER = Paper(
    "MeanFlow",
    "Mean Flows for One-step Generative Modeling",
    "Geng, Zhengyang",
    "2505.13447",
)
IMF_PAPER = Paper(
    "iMF",
    "Improved Mean Flows: On the Challenges of Fastforward Generative Models",
    "Geng, Zhengyang",
    "2512.02012",
)
ALPHA_FLOW_PAPER = Paper(
    "α-Flow",
    "AlphaFlow: Understanding and Improving MeanFlow Models",
    "Zhang, Huijie",
    "2510.20771",
)
SPLIT_PAPER = Paper(
    "SplitMeanFlow",
    "SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling",
    "Guo, Yi",
    "2507.16884",
)


@settings
class MeanFlowSettings(MethodSettings):
    """Defaults are the official ImageNet ones without guidance.

    source             of the velocity: data and noise, or the teacher
    target             over r < t: by the derivative (MeanFlow), or alpha_flow (arXiv 2510.20771) or split (arXiv
                       2507.16884), which need none
    tangent            of the derivative: that velocity, or the student's own u(z, t, t) (improved MeanFlow)
    alpha_start        share of the run from which alpha falls from 1 to 0; rows with r < t weigh alpha
    alpha_end          share of the run at which alpha is 0, and the target the derivative's
    alpha_gamma        steepness of alpha's fall
    alpha_clip         alpha within this of 0 or 1 is 0 or 1
    target_clip        bound of the values of alpha_flow's target; null for none
    span_law           sorted: r and t are the smaller and the larger of two draws; separate: r is the smaller of t and
                       a draw of its own
    ratio              share of rows with r < t
    p_mean             mean of logit t, and of r under span_law sorted
    p_std              standard deviation of logit t, and of r under span_law sorted
    r_mean             mean of logit r under span_law separate; null for p_mean
    r_std              standard deviation of logit r under span_law separate; null for p_std
    omega              guided velocity omega v + (1 - omega - kappa) u(z, t, t | none) + kappa u(z, t, t | y); from a
                       teacher its guidance scale
    kappa              share of the student's own conditional velocity in the guided one
    guidance_start     time from which guidance is on
    guidance_end       time up to which guidance is on
    condition_dropout  share of rows trained without their condition, at r < t too (source data)
    loss               l2: squared error D as D / (D + c)^p; opt_grad: a step g of the output as g / (|g| + c)^p
    norm_p             p of the loss
    norm_c             c of the loss
    per_element        D is the mean of the squares in place of their sum; g is divided by the square root of its number
                       of elements
    tangent_warmup     steps over which the derivative's weight grows from 0 to 1
    derivative         how the derivative along the path is computed
    derivative_step    step of finite_difference
    dispersive         regulariser on the outputs of modules, summed
    dispersive_weight  weight of the regulariser
    dispersive_tau     temperature of the regulariser
    dispersive_blocks  modules whose outputs the regulariser sees
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

    idea: ClassVar[str] = "the mean velocity over a span, by its identity with the velocity"
    origin: ClassVar[Origin | None] = Origin(
        "mean flow",
        MEANFLOW_PAPER,
        (
            Variant("method.target", "alpha_flow", ALPHA_FLOW_PAPER),
            Variant("method.target", "split", SPLIT_PAPER),
            Variant("method.tangent", "student", IMF_PAPER),
        ),
    )
    needs_teacher: ClassVar[NeedsTeacher] = "to_start"
    ignores: ClassVar[tuple[str, ...]] = ("student.prediction", "student.conversion_steps")
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
