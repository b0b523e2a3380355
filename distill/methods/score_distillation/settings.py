"""Settings of rCM, sCM and DMD2."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from ...settings import Derivative, Idle, MethodSettings, NeedsTeacher, Origin, Paper, Variant, settings

Warmup = Literal["code", "paper", "scm"]


RCM_PAPER = Paper(
    "rCM",
    "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
    "Zheng, Kaiwen",
    "2510.08431",
)
SCM_PAPER = Paper(
    "sCM",
    "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
    "Lu, Cheng",
    "2410.11081",
)
DMD2_PAPER = Paper(
    "DMD2",
    "Improved Distribution Matching Distillation for Fast Image Synthesis",
    "Yin, Tianwei",
    "2405.14867",
)


@settings
class RCMSettings(MethodSettings):
    """Defaults are rCM's for text to image (its table 4, and its released code where that says more).

    source               source of dx/dt in the consistency term: the guided teacher (sCD), or data and noise (sCT)
    guidance_scale       guidance of the teacher; 1 = off
    sigma_data           the data's standard deviation per element
    scm_weight           weight of the consistency term; 0: the score term alone (DMD without its discriminator)
    score_weight         weight of the score term; 0: sCM alone, without a fake score
    p_mean               mean of ln(sigma_data tan t) in the consistency term
    p_std                standard deviation of ln(sigma_data tan t) in the consistency term
    tangent_warmup       H: steps over which the factor r of the tangent's second part grows to 1, and before which
                         there is no score term
    tangent_form         where r stands: as in rCM's code, in its paper, or as in sCM
    tangent_c            c of the normalisation g / (|g| + c)
    per_element          |g| is divided by the square root of the number of elements (FastGen, not the papers)
    adaptive             the consistency term is e^w / D times itself minus w, w(t) learned (sCM, algorithm 1; not rCM)
    output_weight        rows are weighted so that a unit of the network's output counts alike at every time (a
                         difference only where it predicts noise or x0); false: the papers' losses, whose networks
                         predict velocities
    derivative           how the derivative along the path is computed
    derivative_step      step of finite_difference
    max_rollout          N_max: rollouts have 1, 2, .. N_max, 1, .. steps in turn
    rollout_times        fixed times of the rollouts' later steps in place of random ones (better for the score alone)
    score_law            law of t in the score terms and rollouts: lognormal of sigma_data tan t, or straight paths'
                         times shifted by score_shift (video)
    score_p_mean         mean of ln(sigma_data tan t) in the lognormal score_law
    score_p_std          standard deviation of ln(sigma_data tan t) in the lognormal score_law
    score_shift          shift of the shifted score_law
    student_update_freq  one step in so many is the student's, the others are the fake score's
    fake_score_lr        learning rate of the fake score; null for the run's; the papers': 5 to 10 times smaller than
                         the student's
    sigma_max            noise level of the first sampling time atan(sigma_max / sigma_data), cut to the teacher's reach
    times                times of sampling after the first
    """

    source: Literal["teacher", "data"] = "teacher"
    guidance_scale: float = Field(1.0, ge=1)
    sigma_data: float = Field(1.0, gt=0)
    scm_weight: float = Field(100.0, ge=0)
    score_weight: float = Field(1.0, ge=0)
    p_mean: float = -0.8
    p_std: float = Field(1.6, gt=0)
    tangent_warmup: int = Field(0, ge=0)
    tangent_form: Warmup = "code"
    tangent_c: float = Field(0.1, gt=0)
    per_element: bool = False
    adaptive: bool = False
    output_weight: bool = True
    derivative: Derivative = "kernel"
    derivative_step: float = Field(1e-3, gt=0)
    max_rollout: int = Field(4, ge=1)
    rollout_times: tuple[float, ...] | None = None
    score_law: Literal["lognormal", "shifted"] = "lognormal"
    score_p_mean: float = 0.0
    score_p_std: float = Field(1.6, gt=0)
    score_shift: float = Field(5.0, gt=0)
    student_update_freq: int = Field(5, ge=2)
    fake_score_lr: float | None = Field(None, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    times: tuple[float, ...] = (1.3, 1.0, 0.6)

    idea: ClassVar[str] = "continuous-time consistency (sCM), regularised by a score"
    origin: ClassVar[Origin | None] = Origin(
        "score distillation", RCM_PAPER, (Variant("method.score_weight", 0, SCM_PAPER),)
    )
    needs_teacher: ClassVar[NeedsTeacher] = "to_start"
    before: ClassVar[dict[str, Any]] = {"output_weight": False}
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.source method.p_mean method.p_std method.tangent_form method.tangent_c method.per_element "
             "method.derivative method.derivative_step", "method.scm_weight", values=(0,)),
        Idle("method.max_rollout method.rollout_times method.score_law method.score_p_mean method.score_p_std "
             "method.score_shift method.student_update_freq method.fake_score_lr", "method.score_weight", values=(0,)),
        Idle("method.derivative_step", "method.derivative", only=("finite_difference",)),
        Idle("method.score_p_mean method.score_p_std", "method.score_law", only=("lognormal",)),
        Idle("method.score_shift", "method.score_law", only=("shifted",)),
        Idle("method.tangent_warmup", "max_train_steps", longer=True),
    )  # fmt: skip


@settings
class DMD2Settings(MethodSettings):
    """Values of the released code (tianweiy/DMD2); of SDXL's four-step recipe where recipes differ.

    guidance_scale       guidance of the teacher; 1 = off
    num_steps            steps of a picture, at i / num_steps of the teacher's time; rollouts end at each of them in
                         turn
    student_update_freq  fake-score steps per student step: 5, in SD 1.5's recipe 10 (dfake_gen_update_ratio)
    fake_score_lr        learning rate of fake score and discriminator; null for the run's
    min_share            least share of the teacher's time where the scores are compared (min_step_percent)
    max_share            largest share of the teacher's time where the scores are compared (max_step_percent)
    gan_weight           weight of -log D(G) in the student's loss (gen_cls_loss_weight: SDXL 5e-3, SD 1.5 1e-3); 0: no
                         discriminator
    critic_weight        weight of the discriminator's loss in the fake score's (guidance_cls_loss_weight)
    sigma_data           the data's standard deviation per element, of TrigFlow, in which all of it is written
    """

    guidance_scale: float = Field(1.0, ge=1)
    num_steps: int = Field(4, ge=1)
    student_update_freq: int = Field(5, ge=1)
    fake_score_lr: float | None = Field(None, gt=0)
    min_share: float = Field(0.02, ge=0, lt=1)
    max_share: float = Field(0.98, gt=0, le=1)
    gan_weight: float = Field(5e-3, ge=0)
    critic_weight: float = Field(1e-2, gt=0)
    sigma_data: float = Field(1.0, gt=0)

    idea: ClassVar[str] = "the student's pictures get the teacher's distribution"
    origin: ClassVar[Origin | None] = Origin("score distillation", DMD2_PAPER)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    idle: ClassVar[tuple[Idle, ...]] = (Idle("method.critic_weight", "method.gan_weight", values=(0,)),)
