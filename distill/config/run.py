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
    """What is trained on.

    With `name: teacher` the teacher makes latents of `prompts` by its own sampler; the last five keys are for that.

    name                  emoji, emoji-noto, emoji-twemoji, fashion-mnist, cifar10, an image folder, webdataset shards,
                          a hub data set, or teacher
    split                 part of the data that is trained on
    image_column          column of the pictures, in shards the ending of their files
    caption_column        column of the captions; null for pictures without captions
    center_crop           the middle square of a picture; false: the whole picture, squeezed into a square
    random_flip           mirror every second picture, for methods that train on pixels
    prompts               with name teacher: text file of one prompt a line, or a folder of such files
    num_inference_steps   with name teacher: steps of the teacher's own sampler; null for 50
    guidance_scale        with name teacher: guidance of its pictures; null for the teacher's own
    images_per_prompt     with name teacher: pictures of each prompt; null for 1
    seed                  with name teacher: of the noise; null for 0
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
    """The last snapshots of the student's weights, for the search `lcsc`.

    every  steps between snapshots of the student's weights; 0 for none
    keep   newest snapshots that stay
    """

    every: int = Field(0, ge=0, le=COUNTS)
    keep: int = Field(20, ge=1, le=COUNTS)


@settings
class RunConfig:
    """Keys are the flag names of diffusers' training scripts.

    run:
    output_dir                   folder of the run: configuration, log, checkpoints, samples, the exported pipeline
    resolution                   side of the pictures in pixels; null for the teacher's
    seed                         seed of weights, order of the data, noise and times
    train_batch_size             pictures of a step on each device
    gradient_accumulation_steps  batches whose gradients are added up for one step
    max_train_steps              steps in all
    checkpointing_steps          steps between checkpoints
    checkpoints_total_limit      checkpoints that stay; null for all
    resume_from_checkpoint       latest, checkpoint-STEP, or the path of another run's checkpoint, where a new run
                                 folder begins (with its step as max_train_steps it is only exported); null: only a new
                                 start will do

    data:
    data  what is trained on

    teacher:
    teacher  the model that is distilled, or that the student starts from; null to train from data alone
    vae      autoencoder of a method that works in latents without a teacher

    student:
    student      what is trained
    use_ema      export an average of the weights over the steps
    ema_decay    share of the average that stays at each step
    ema_std      relative width of EDM2's power function average, in place of ema_decay; null for ema_decay
    raw_weights  snapshots of the weights for the search lcsc

    optimiser:
    optimizer          of every trained network; adamw_8bit is torchao's, without torchao that of bitsandbytes
    learning_rate      highest learning rate of the student
    lr_scheduler       course of the learning rate
    lr_warmup_steps    steps over which the learning rate rises from 0
    adam_beta1         decay of the average of gradients
    adam_beta2         decay of the average of their squares
    adam_weight_decay  decay of the weights a step, times the learning rate
    adam_epsilon       added to the root of the squares' average
    max_grad_norm      gradients of a larger norm are scaled down to it; null for no bound

    memory:
    mixed_precision         number format of the networks' arithmetic
    gradient_checkpointing  compute activations again in the backward pass in place of keeping them
    compile                 run the networks through torch.compile
    cpu_offload             keep text encoders and autoencoder in the CPU's memory while they wait
    allow_tf32              matrix products of fp32 in TF32, on GPUs that have it
    enable_xformers_memory_efficient_attention  attention by xformers

    logging:
    logging_steps       steps between lines of log.jsonl
    report_to           tracker that also gets these lines
    validation_steps    steps between pictures in samples/; 0 for none
    validation_prompts  prompts of these pictures; none: captions of the data

    method:
    method  how the student is trained; `fewstep methods` lists them
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
