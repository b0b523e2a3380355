"""Settings of LCD, RG-LCD and SCott."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, Origin, Paper, Variant, settings

LCM_PAPER = Paper(
    "LCM",
    "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
    "Luo, Simian",
    "2310.04378",
)
LCM_LORA_PAPER = Paper(
    "LCM-LoRA",
    "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
    "Luo, Simian",
    "2311.05556",
)
RGLCD_PAPER = Paper(
    "RG-LCD",
    "Reward Guided Latent Consistency Distillation",
    "Li, Jiachen",
    "2403.11027",
)
CTRLU_PAPER = Paper(
    "Ctrl-U",
    "Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling",
    "Zhang, Guiyu",
    "2410.11236",
)
SCOTT_PAPER = Paper(
    "SCott",
    "SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation",
    "Liu, Hongjian",
    "2403.01505",
)


@settings
class LatentConsistencySettings(MethodSettings):
    """Guidance here is the paper's omega, w = guidance_scale - 1.

    w_min             least omega; it is uniform up to w_max
    w_max             largest omega that is trained
    guidance_dim      width of the omega embedding of a full student
    timestep_scaling  steepness of the boundary condition at the data
    distance          between student and target
    huber_c           c of huber
    target_decay      average of the target network (full); a LoRA's target is the student itself; null for the same
    w_export          omega of the pictures and of sampling.json; must lie in the trained range
    sampling_power    sampling times of pictures and sampling.json stand at (1 - i/n)^power of the way from the data; 1
                      is LCMScheduler's
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
    """Those of latent consistency, and the teacher's step.

    num_ddim_timesteps  N: the teacher's steps are k = T/N long
    """

    num_ddim_timesteps: int = Field(50, ge=1)

    idea: ClassVar[str] = "one DDIM step of the guided teacher leads to the same x0"
    origin: ClassVar[Origin | None] = Origin(
        "latent consistency", LCM_PAPER, (Variant("student.kind", "lora", LCM_LORA_PAPER, beside=True),)
    )


@settings
class LRMSettings:
    """Defaults are latent_ViT's of the official code; "ours": the release has neither weights nor their training.

    vision_width            width of the ViT on latents
    vision_layers           its blocks
    vision_heads            its attention heads
    patch_size              side of its patches in latents
    embed_dim               width of the space where latents and texts are compared
    unlocked_vision_layers  its last blocks, which matching trains
    text_layers             trained blocks above the teacher's frozen text states (official: the last 5 of a 24-block
                            text tower, which starts from weights that are not released)
    learning_rate           of matching, after every step of the student
    pretrain_steps          iterations of contrastive training before the student moves (ours)
    pretrain_lr             learning rate of contrastive training (from a checkpoint's name)
    batch_size              rows of the batch that matching uses
    smooth                  where the expert prefers a generated latent to the real one, call it a draw
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

    pair        R_b of the student at t + 1 with the same noise (Ctrl-U), or of LCD's own target: without a second pass,
                and with a gradient through R_a alone
    weight      exp(-U); the same without its gradient; or none: the plain mean of both costs (a control)
    penalty     lambda of the mean of U
    spread      reward differences of this size count as 1 (ours: no value for scalar rewards is known)
    t_min       only samples from this time on are rewarded; null for all
    t_max       only samples up to this time are rewarded (Ctrl-U: 200 or 400); null for all (ours)
    ramp_steps  the reward's weight grows to its full value over these iterations (Ctrl-U: 5,000)
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
    """Those of LCD, and the reward.

    reward        image-reward, hpsv2, pickscore, lite0-minilm or MODEL:TAG of open_clip; with lrm: the expert that it
                  copies
    reward_scale  beta, the weight of the reward
    lrm           the latent proxy reward model; null: the reward itself, through the decoder
    uncertainty   Ctrl-U's weighting; null: off
    """

    reward: str = "hpsv2"
    reward_scale: float = Field(1.0, ge=0)
    lrm: LRMSettings | None = None
    uncertainty: CtrlUSettings | None = None

    idea: ClassVar[str] = "lcd, and a reward of the one-step pictures"
    origin: ClassVar[Origin | None] = Origin(
        "latent consistency", RGLCD_PAPER, (Variant("method.uncertainty", ..., CTRLU_PAPER, beside=True),)
    )
    idle: ClassVar[tuple[Idle, ...]] = (
        *LCDSettings.idle,
        Idle("method.uncertainty.penalty method.uncertainty.spread", "method.uncertainty.weight",
             only=("uncertainty", "detached")),
        Idle("method.uncertainty.ramp_steps", "max_train_steps", longer=True),
        Idle("method.lrm.pretrain_lr", "method.lrm.pretrain_steps", values=(0,)),
    )  # fmt: skip


@settings
class SCottSettings(LatentConsistencySettings):
    """There is no official code; "ours": chosen here.

    segment              t_hi - t_lo, the length of the teacher's way
    num_solver_steps     equal stochastic steps that solve a segment
    times                t_hi: all integers 1 .. T-1, or a grid from T-1 down in segments (ours: all)
    solver               er_sde, ddim; the other two are ddim with eta 1 (ours: er_sde)
    noise_function       noise function of er_sde; null for SDE_5
    eta                  eta of ddim: 0 without noise, 1 as much as the forward process
    lambda_adv           weight of -D(prediction) in the student's loss; 0: no discriminator
    gan_start_step       iterations in which the discriminator learns before it is listened to (ours: 0)
    discriminator_rank   rank of the LoRA in the decoder, on the layers that LCM-LoRA adapts
    discriminator_lr     learning rate of the discriminator
    discriminator_beta1  adam_beta1 of the discriminator
    renoise              D sees both sides at one new noise level instead of clean (ours: clean)
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

    idea: ClassVar[str] = "stochastic steps of the teacher, and a discriminator"
    origin: ClassVar[Origin | None] = Origin("latent consistency", SCOTT_PAPER)
    idle: ClassVar[tuple[Idle, ...]] = (
        *LatentConsistencySettings.idle,
        Idle("method.gan_start_step method.discriminator_rank method.discriminator_lr method.discriminator_beta1 "
             "method.renoise", "method.lambda_adv", values=(0,)),
        Idle("method.gan_start_step", "max_train_steps", longer=True),
        Idle("method.eta", "method.solver", only=("ddim",)),
        Idle("method.noise_function", "method.solver", only=("er_sde",)),
    )  # fmt: skip
