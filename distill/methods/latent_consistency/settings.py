"""Settings of LCD, RG-LCD and SCott."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, Paper, settings

LCM_PAPER = Paper(
    "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
    "Luo, Simian",
    "2310.04378",
)
RGLCD_PAPER = Paper(
    "Reward Guided Latent Consistency Distillation",
    "Li, Jiachen",
    "2403.11027",
)
SCOTT_PAPER = Paper(
    "SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation",
    "Liu, Hongjian",
    "2403.01505",
)


@settings
class LatentConsistencySettings(MethodSettings):
    """Guidance here is the paper's omega, w = guidance_scale - 1.

    w_min, w_max           omega is uniform on this range for each sample
    guidance_dim           width of the omega embedding of a full student
    timestep_scaling       of the boundary condition
    distance, huber_c      between student and target
    target_decay           EMA of the target network (full); a LoRA's target is the student itself
    w_export               omega of the pictures and of sampling.json; must lie in the trained range
    sampling_power         sampling times of pictures and sampling.json, see `lcm_timesteps`; 1 is LCMScheduler's
    """

    w_min: float = Field(5.0, ge=0)
    w_max: float = Field(15.0, ge=0)
    guidance_dim: int = Field(256, ge=4)
    timestep_scaling: float = 10.0
    distance: Distance = "huber"
    huber_c: float = Field(1e-3, gt=0)
    target_decay: float | None = Field(0.95, ge=0, lt=1)
    w_export: float = 7.5
    sampling_power: float = Field(1.0, ge=1, le=4)

    ignores: ClassVar[tuple[str, ...]] = ("student.init", "student.network", "student.norm")
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.huber_c", "method.distance", only=("huber",)),
        Idle("method.guidance_dim method.target_decay", "student.kind", only=("full",)),
    )


@settings
class LCDSettings(LatentConsistencySettings):
    """num_ddim_timesteps: N, the teacher's steps are k = T/N long."""

    num_ddim_timesteps: int = Field(50, ge=1)

    label: ClassVar[str] = "LCM"
    papers: ClassVar[tuple[Paper, ...]] = (LCM_PAPER,)


@settings
class LRMSettings:
    """Defaults are latent_ViT's of the official code; "ours": the release has neither weights nor their training.

    vision_*, patch_size, embed_dim  the ViT on latents; unlocked_vision_layers: last blocks that matching trains
    text_layers                      trained blocks above the teacher's frozen text states (official: the last 5 of a
                                     24-block text tower, which starts from weights that are not released)
    learning_rate                    of matching, after every step of the student
    pretrain_steps, pretrain_lr      iterations of contrastive training before the student moves (ours; rate from a
                                     checkpoint's name)
    batch_size                       rows of the batch that matching uses
    smooth                           where the expert prefers a generated latent to the real one, call it a draw
    """

    vision_width: int = Field(512, ge=8)
    vision_layers: int = Field(12, ge=1)
    vision_heads: int = Field(8, ge=1)
    patch_size: int = Field(4, ge=1)
    embed_dim: int = Field(1024, ge=1)
    unlocked_vision_layers: int = Field(1, ge=0)
    text_layers: int = Field(5, ge=1)
    learning_rate: float = Field(3.3e-6, gt=0)
    pretrain_steps: int = Field(10000, ge=0)
    pretrain_lr: float = Field(5e-4, gt=0)
    batch_size: int = Field(16, ge=1)
    smooth: bool = False


@settings
class CtrlUSettings:
    """Ctrl-U (arXiv 2410.11236) for a scalar reward: U = |R_a - R_b| / spread, cost = best reward - R.

    pair                  R_b of the student at t + 1 with the same noise (Ctrl-U), or of LCD's own target: without a
                          second pass, and with a gradient through R_a alone
    weight                exp(-U); the same without its gradient; or none: the plain mean of both costs (a control)
    penalty               lambda of the mean of U
    spread                reward differences of this size count as 1 (ours: no value for scalar rewards is known)
    t_min, t_max          only samples at these times are rewarded (Ctrl-U: up to 200 or 400; ours: all)
    ramp_steps            the reward's weight grows to its full value over these iterations (Ctrl-U: 5,000)
    """

    pair: Literal["second_pass", "target"] = "second_pass"
    weight: Literal["uncertainty", "detached", "uniform"] = "uncertainty"
    penalty: float = Field(0.1, ge=0)
    spread: float = Field(0.1, gt=0)
    t_min: int | None = Field(None, ge=0)
    t_max: int | None = Field(None, ge=0)
    ramp_steps: int = Field(0, ge=0)


@settings
class RGLCDSettings(LCDSettings):
    """reward        name of the reward, see `load_reward`; with lrm: the expert that it copies
    reward_scale  beta
    lrm           settings of the latent proxy reward model; null: the reward itself, through the decoder
    uncertainty   settings of Ctrl-U's weighting; null: off
    """

    reward: str = "hpsv2"
    reward_scale: float = Field(1.0, ge=0)
    lrm: LRMSettings | None = None
    uncertainty: CtrlUSettings | None = None

    label: ClassVar[str] = "RG-LCM"
    papers: ClassVar[tuple[Paper, ...]] = (RGLCD_PAPER,)
    idle: ClassVar[tuple[Idle, ...]] = (
        *LCDSettings.idle,
        Idle("method.uncertainty.penalty method.uncertainty.spread", "method.uncertainty.weight",
             only=("uncertainty", "detached")),
        Idle("method.uncertainty.ramp_steps", "max_train_steps", longer=True),
        Idle("method.lrm.pretrain_lr", "method.lrm.pretrain_steps", values=(0,)),
    )  # fmt: skip


@settings
class SCottSettings(LatentConsistencySettings):
    """Values of the paper as two summaries of it give them; "ours": not known, chosen here.

    segment, num_solver_steps  t_hi - t_lo, solved in this many equal stochastic steps
    times                      t_hi: all integers 1 .. T-1, or a grid from T-1 down in segments (ours: all)
    solver                     er_sde with its noise_function (SDE_5 unless given), ddim with its eta; the other two
                               are ddim with eta 1 (which one the paper ends with is not known; ours: er_sde)
    lambda_adv                 weight of -D(prediction) in the student's loss; 0: no discriminator
    gan_start_step             iterations in which the discriminator learns before it is listened to (ours: 0)
    discriminator_rank         of the LoRA in the decoder, on the layers that LCM-LoRA adapts (the summaries disagree);
                               discriminator_lr, discriminator_beta1 of its optimiser
    renoise                    D sees both sides at one new noise level instead of clean (ours: clean)
    """

    segment: int = Field(24, ge=1)
    num_solver_steps: int = Field(3, ge=1)
    times: Literal["all", "grid"] = "all"
    solver: Literal["er_sde", "ddim", "sde_dpm_solver++", "euler_ancestral"] = "er_sde"
    noise_function: Literal["ODE", "SDE", "SDE_1", "SDE_2", "SDE_3", "SDE_4", "SDE_5"] | None = None
    eta: float | None = Field(None, ge=0, le=1)
    lambda_adv: float = Field(0.4, ge=0)
    gan_start_step: int = Field(0, ge=0)
    discriminator_rank: int = Field(64, ge=1)
    discriminator_lr: float = Field(2e-5, gt=0)
    discriminator_beta1: float = Field(0.9, ge=0, lt=1)
    renoise: bool = False

    label: ClassVar[str] = "SCott"
    papers: ClassVar[tuple[Paper, ...]] = (SCOTT_PAPER,)
    idle: ClassVar[tuple[Idle, ...]] = (
        *LatentConsistencySettings.idle,
        Idle("method.gan_start_step method.discriminator_rank method.discriminator_lr method.discriminator_beta1 "
             "method.renoise", "method.lambda_adv", values=(0,)),
        Idle("method.gan_start_step", "max_train_steps", longer=True),
        Idle("method.eta", "method.solver", only=("ddim",)),
        Idle("method.noise_function", "method.solver", only=("er_sde",)),
    )  # fmt: skip
