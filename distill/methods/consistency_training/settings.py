"""Settings of iCT, CT, CD, ECT and latent consistency training."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Idle, MethodSettings, NeedsTeacher, Paper, settings

Curriculum = Literal["doubling", "sqrt", "constant", "continuous"]


ICT_PAPER = Paper(
    "Improved Techniques for Training Consistency Models",
    "Song, Yang",
    "2310.14189",
)
CM_PAPER = Paper(
    "Consistency Models",
    "Song, Yang",
    "2303.01469",
)
LCT_PAPER = Paper(
    "Improved Training Technique for Latent Consistency Models",
    "Dao, Quan",
    "2502.01441",
)


@settings
class ConsistencySettings(MethodSettings):
    """Defaults are iCT's.

    target             whose weights see x_lo: the student's own, without a gradient, or their average (CT, CD)
    curriculum         number of noise levels: doubling from s0 to s1 (iCT), its square growing (CT), constant at
                       num_points (CD)
    noise              pairs drawn lognormally with p_mean, p_std, or uniformly
    weighting          inverse_gap 1 / (sigma_hi - sigma_lo), or uniform
    target_decay       of the averaged target, scheduled with N under sqrt
    sigma_*, rho       the EDM process; sigma_data is the data's standard deviation per element
    two_step_sigma     where the second step of pictures and sampling.json starts
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
    """Those of consistency training, and

    ode_source         where x_lo comes from: the data's own noise, or a step of the teacher's ODE (CD)
    curriculum         also continuous pairs (ECT) with q, k, b over num_stages equal stages
    distance, huber_c  pseudo_huber of the whole sample, c = 0.00054 sqrt(D) unless given (0: the norm); or mean l1, l2
    solver             of the teacher's step; guidance_scale of the teacher, 1 = off
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

    label: ClassVar[str] = "iCT"
    papers: ClassVar[tuple[Paper, ...]] = (
        ICT_PAPER,
        CM_PAPER,
    )
    needs_teacher: ClassVar[NeedsTeacher] = "to_start"
    idle: ClassVar[tuple[Idle, ...]] = (
        *ConsistencySettings.idle,
        Idle("method.q method.k method.b method.num_stages", "method.curriculum", only=("continuous",)),
        Idle("method.huber_c", "method.distance", only=("pseudo_huber",)),
        Idle("method.solver method.guidance_scale", "method.ode_source", only=("teacher",)),
    )


@settings
class LCTSettings(ConsistencySettings):
    """Those of consistency training with s1 = 640, and

    distance          of the mean square over a sample: cauchy, geman_mcclure, mean_huber (all with c), l2; of the mean
                      absolute value: l1; of the whole sample: pseudo_huber, iCT's with its own c = 0.00054 sqrt(D)
    c                 constant; without it c_first in the first stage, then exp(c_slope ln(N - 1) + c_offset), as in the
                      paper's code
    diffusion_weight  of EDM's denoising loss (arXiv 2206.00364, table 1) on the pairs of the low-noise end, from the
                      share diffusion_from of the levels counted from the noisiest
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

    label: ClassVar[str] = "LCT"
    papers: ClassVar[tuple[Paper, ...]] = (LCT_PAPER,)
    idle: ClassVar[tuple[Idle, ...]] = (
        *(row for row in ConsistencySettings.idle if "method.s0" not in row.keys),
        Idle("method.s1", "method.curriculum", only=("doubling", "sqrt")),
        Idle("method.c method.c_first method.c_slope method.c_offset", "method.distance",
             only=("cauchy", "geman_mcclure", "mean_huber")),
        Idle("method.c_first method.c_slope method.c_offset", "method.c", only=(None,)),
        Idle("method.diffusion_from", "method.diffusion_weight", values=(0,)),
    )  # fmt: skip
