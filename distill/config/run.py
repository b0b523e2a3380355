"""What a training run is configured by."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..settings import COUNTS, SEEDS, AutoencoderSettings, StudentSettings, TeacherSettings, settings

Precision = Annotated[
    Literal["no", "fp16", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads a bare no as false
]


@settings
class DataSettings:
    """name: "emoji", "emoji-noto", "emoji-twemoji", "fashion-mnist", "cifar10", an image folder, webdataset shards, or
    a hub data set. caption_column: null for pictures without captions. random_flip: mirror every second image, for
    methods that train on pixels.

    "teacher": the teacher makes the data's latents from `prompts`, a text file of one prompt a line or a folder of
    such files, and the other keys apply: num_inference_steps (50) of its own sampler, guidance_scale (its own),
    images_per_prompt (1), and the seed of the noise (0).
    """

    name: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = "text"
    center_crop: bool = True
    random_flip: bool = False
    prompts: str | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    images_per_prompt: int | None = Field(None, ge=1, le=COUNTS)
    seed: int | None = Field(None, ge=0, lt=SEEDS)


@settings
class RawWeightsSettings:
    """every: steps between saves of the student's raw weights, 0 for none; keep: how many stay."""

    every: int = Field(0, ge=0, le=COUNTS)
    keep: int = Field(20, ge=1, le=COUNTS)


@settings
class RunConfig:
    """Keys are the flag names of diffusers' training scripts; train_batch_size is per device.

    vae: the autoencoder of a method that works in latents without a teacher. ema_std: of EDM2's power function average,
    in place of ema_decay. resume_from_checkpoint: latest, checkpoint-<step>, or the path of another run's checkpoint,
    where a new run folder begins (with its step as max_train_steps it is only exported). compile: the networks, by
    torch.compile. cpu_offload: text encoders and autoencoder wait in the CPU's memory. optimizer adamw_8bit: torchao's,
    or bitsandbytes' without torchao.
    """

    output_dir: str
    method: Any
    data: DataSettings
    teacher: TeacherSettings | None = None
    vae: AutoencoderSettings | None = None
    student: StudentSettings = Field(default_factory=StudentSettings)
    resolution: int | None = Field(None, ge=1, le=16384)
    seed: int = Field(0, ge=0, lt=SEEDS)
    train_batch_size: int = Field(16, ge=1, le=65536)
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536)
    max_train_steps: int = Field(1000, ge=1, le=COUNTS)
    optimizer: Literal["adamw", "adamw_8bit", "radam"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0, le=100)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0, le=COUNTS)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0, le=1000)
    adam_epsilon: float = Field(1e-8, ge=0, le=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu_offload: bool = False
    allow_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    use_ema: bool = False
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    ema_std: float | None = Field(None, gt=0, lt=0.28)
    checkpointing_steps: int = Field(500, ge=1, le=COUNTS)
    checkpoints_total_limit: int | None = Field(2, ge=1, le=COUNTS)
    resume_from_checkpoint: str | None = "latest"
    raw_weights: RawWeightsSettings = Field(default_factory=RawWeightsSettings)
    logging_steps: int = Field(10, ge=1, le=COUNTS)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    validation_steps: int = Field(0, ge=0, le=COUNTS)
    validation_prompts: tuple[str, ...] = ()
