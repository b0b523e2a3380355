"""Settings of iCT, CT, CD, ECT and latent consistency training."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Idle, MethodSettings, NeedsTeacher, Origin, Paper, Variant, settings

Curriculum = Literal["doubling", "sqrt", "constant", "continuous"]


ICT_PAPER = Paper(
    "iCT",
    "Improved Techniques for Training Consistency Models",
    "Song, Yang",
    "2310.14189",
)
CT_PAPER, CD_PAPER = (Paper(name, "Consistency Models", "Song, Yang", "2303.01469") for name in ("CT", "CD"))
ECT_PAPER = Paper(
    "ECT",
    "Consistency Models Made Easy",
    "Geng, Zhengyang",
    "2406.14548",
)
LCT_PAPER = Paper(
    "sLCT",
    "Improved Training Technique for Latent Consistency Models",
    "Dao, Quan",
    "2502.01441",
)


@settings
class ConsistencySettings(MethodSettings):
    """Of consistency training in EDM's noise levels. Defaults are iCT's.

    target          whose weights see x_lo: the student's own, without a gradient, or their average (CT, CD)
    curriculum      number of noise levels: doubling from s0 to s1 (iCT), its square growing (CT), constant (CD)
    s0              noise levels at the start, less one
    s1              noise levels at the end, less one
    num_points      noise levels of the constant curriculum
    noise           law of the pairs: lognormal, or uniform
    p_mean          mean of ln sigma in the lognormal law
    p_std           standard deviation of ln sigma in the lognormal law
    weighting       inverse_gap: 1 / (sigma_hi - sigma_lo); or uniform
    target_decay    decay of the averaged target; under sqrt it changes with the number of levels
    sigma_min       lowest noise level of the EDM process
    sigma_max       highest noise level of the EDM process
    sigma_data      the data's standard deviation per element
    rho             bends the grid of noise levels
    two_step_sigma  noise level where the second step of pictures and sampling.json starts
    """

    target: Literal["student", "ema"] = "student"
    curriculum: Curriculum = "doubling"
    s0: int = Field(10, ge=1)
    s1: int = Field(1280, ge=2)
    num_points: int = Field(18, ge=2)
    noise: Literal["lognormal", "uniform"] = "lognormal"
    p_mean: float = -1.1
    p_std: float = Field(2.0, gt=0)
    weighting: Literal["inverse_gap", "uniform"] = "inverse_gap"
    target_decay: float = Field(0.9, gt=0, lt=1)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    rho: float = Field(7.0, gt=0)
    two_step_sigma: float = Field(0.821, gt=0)

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.s0 method.s1", "method.curriculum", only=("doubling", "sqrt")),
        Idle("method.num_points", "method.curriculum", only=("constant",)),
        Idle("method.p_mean method.p_std", "method.noise", only=("lognormal",)),
        Idle("method.target_decay", "method.target", only=("ema",)),
    )


@settings
class ICTSettings(ConsistencySettings):
    """Those of consistency training, with CD and ECT as other values.

    ode_source      where x_lo comes from: the data's own noise, or a step of the teacher's ODE (CD)
    curriculum      number of noise levels: doubling from s0 to s1 (iCT), its square growing (CT), constant (CD), or
                    continuous pairs (ECT) with q, k and b
    q               of continuous pairs: the ratio to the next level falls by 1/q a stage
    k               of continuous pairs: extra width at low noise
    b               of continuous pairs: how fast that width ends with the noise level
    num_stages      equal stages of the run, of continuous pairs
    distance        between student and target: pseudo_huber of the whole sample, or mean l1, l2
    huber_c         c of pseudo_huber; null for 0.00054 sqrt(D), 0 for the norm
    solver          solver of the teacher's step
    guidance_scale  guidance of the teacher; 1 = off
    """

    ode_source: Literal["data", "teacher"] = "data"
    curriculum: Curriculum = "doubling"
    q: float = Field(2.0, gt=1)
    k: float = Field(8.0, ge=0)
    b: float = Field(1.0, ge=0)
    num_stages: int = Field(8, ge=1)
    distance: Literal["pseudo_huber", "l1", "l2"] = "pseudo_huber"
    huber_c: float | None = Field(None, ge=0)
    solver: Literal["heun", "euler"] = "heun"
    guidance_scale: float = Field(1.0, ge=1)

    idea: ClassVar[str] = "two noise levels of a picture lead to the same x0; also CT, CD, ECT"
    origin: ClassVar[Origin | None] = Origin(
        "consistency training",
        ICT_PAPER,
        (
            Variant("method.ode_source", "teacher", CD_PAPER),
            Variant("method.target", "ema", CT_PAPER),
            Variant("method.curriculum", "continuous", ECT_PAPER),
        ),
    )
    needs_teacher: ClassVar[NeedsTeacher] = "to_start"
    ignores: ClassVar[tuple[str, ...]] = ("student.prediction", "student.conversion_steps")
    idle: ClassVar[tuple[Idle, ...]] = (
        *ConsistencySettings.idle,
        Idle("method.q method.k method.b method.num_stages", "method.curriculum", only=("continuous",)),
        Idle("method.huber_c", "method.distance", only=("pseudo_huber",)),
        Idle("method.solver method.guidance_scale", "method.ode_source", only=("teacher",)),
    )


@settings
class LCTSettings(ConsistencySettings):
    """Those of consistency training in latents.

    distance          of the mean square over a sample: cauchy, geman_mcclure, mean_huber (all with c), l2; of the mean
                      absolute value: l1; of the whole sample: pseudo_huber, iCT's with its own c = 0.00054 sqrt(D)
    c                 scale of the distance, constant; null for c_first, then exp(c_slope ln(N - 1) + c_offset), as in
                      the paper's code
    c_first           c in the first stage, while c is null
    c_slope           slope of ln c over ln(N - 1), N noise levels
    c_offset          ln c at N = 2 noise levels
    diffusion_weight  weight of EDM's denoising loss (arXiv 2206.00364, table 1) on the pairs of the low-noise end
    diffusion_from    share of the levels, counted from the noisiest, after which that loss begins
    coupling          noise by optimal transport over the rows of a process's batch that are told the same (condition),
                      over all of them (batch), or as it is drawn (none)
    normalise         each element of the latents to mean 0 and standard deviation sigma_data over the training set;
                      else sigma_data must be that of the latents
    """

    s1: int = Field(640, ge=2)
    two_step_sigma: float = Field(0.369, gt=0)
    curriculum: Literal["doubling", "sqrt", "constant"] = "doubling"
    distance: Literal["cauchy", "geman_mcclure", "mean_huber", "l2", "l1", "pseudo_huber"] = "cauchy"
    c: float | None = Field(None, gt=0)
    c_first: float = Field(
        0.03456, gt=0
    )  # 0.00054 sqrt(4 x 32 x 32), of latents of 256 px; of a mean, so of any size
    c_slope: float = -1.15
    c_offset: float = -0.85
    diffusion_weight: float = Field(5.0, ge=0)
    diffusion_from: float = Field(0.75, ge=0, le=1)
    coupling: Literal["condition", "batch", "none"] = "condition"
    normalise: bool = True

    idea: ClassVar[str] = "ict in latents, robust to their outliers"
    origin: ClassVar[Origin | None] = Origin("consistency training", LCT_PAPER)
    idle: ClassVar[tuple[Idle, ...]] = (
        *(row for row in ConsistencySettings.idle if "method.s0" not in row.keys),
        Idle("method.s1", "method.curriculum", only=("doubling", "sqrt")),
        Idle("method.c method.c_first method.c_slope method.c_offset", "method.distance",
             only=("cauchy", "geman_mcclure", "mean_huber")),
        Idle("method.c_first method.c_slope method.c_offset", "method.c", only=(None,)),
        Idle("method.diffusion_from", "method.diffusion_weight", values=(0,)),
    )  # fmt: skip
