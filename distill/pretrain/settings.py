"""Settings of the stages that train the embedded teachers."""

from typing import ClassVar

from pydantic import Field

from ..methods.control.controls import SpatialControl
from ..settings import MethodSettings, NeedsTeacher, Paper, settings

EDM_PAPER = Paper(
    "Elucidating the Design Space of Diffusion-Based Generative Models",
    "Karras, Tero",
    "2206.00364",
)
CONTROLNET_PAPER = Paper(
    "Adding Conditional Control to Text-to-Image Diffusion Models",
    "Zhang, Lvmin",
    "2302.05543",
)


@settings
class DiffusionSettings(MethodSettings):
    """caption_dropout: share of samples trained without their prompt. snr_gamma: min-SNR weighting of the epsilon
    loss (arXiv 2303.09556, eq. 6), min(SNR, gamma)/SNR; null for equal weights. guidance_scale: of the pictures and
    of sampling.json."""

    caption_dropout: float = 0.1
    snr_gamma: float | None = None
    guidance_scale: float = 3.0

    ignores: ClassVar[tuple[str, ...]] = ("student.init", "student.network", "student.norm")
    needs_teacher: ClassVar[NeedsTeacher] = "always"


@settings
class EDMSettings(MethodSettings):
    """Defaults are EDM's (table 1): ln sigma is normal with mean p_mean and standard deviation p_std in training;
    sampling runs from sigma_max to sigma_min on a grid bent by rho. num_inference_steps: of Heun, in pictures and
    sampling.json."""

    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    rho: float = Field(7.0, gt=0)
    num_inference_steps: int = Field(18, ge=1)

    label: ClassVar[str] = "EDM"
    papers: ClassVar[tuple[Paper, ...]] = (EDM_PAPER,)
    ignores: ClassVar[tuple[str, ...]] = ("teacher",)


@settings
class AutoencoderSettings(MethodSettings):
    """l1_weight, l2_weight, kl_weight: weights of the mean absolute error, the mean squared error and the mean KL
    divergence per latent element. max_shift: augmentation by whole pixels. recolour: share of images whose colour
    channels are permuted."""

    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    latent_channels: int = 4
    l1_weight: float = 1.0
    l2_weight: float = 2.0
    kl_weight: float = 1e-3
    max_shift: int = 2
    recolour: float = 0.3

    ignores: ClassVar[tuple[str, ...]] = (
        "teacher",
        "student",
        "validation_steps",
        "validation_prompts",
        "compile",
    )


@settings
class TextEncoderSettings(MethodSettings):
    """vocabulary_size: byte-pair tokens. num_words, num_edits, num_combinations: training phrases of each kind beside
    the captions: single words, captions with one word changed, and two or three words at random."""

    vocabulary_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 16
    num_words: int = 8000
    num_edits: int = 6000
    num_combinations: int = 10000

    ignores: ClassVar[tuple[str, ...]] = (
        "teacher",
        "student",
        "validation_steps",
        "validation_prompts",
        "compile",
        "gradient_checkpointing",
        "enable_xformers_memory_efficient_attention",
        "data.center_crop",
    )


@settings
class ControlNetSettings(MethodSettings):
    """control: what the adapter sees of a picture, by its name and that control's own keys.

    caption_dropout  share of samples trained without their prompt; the paper's
    guidance_scale   of the pictures and of sampling.json
    """

    control: SpatialControl
    caption_dropout: float = Field(0.5, ge=0, lt=1)
    guidance_scale: float = Field(3.0, ge=1)

    label: ClassVar[str] = "ControlNet"
    papers: ClassVar[tuple[Paper, ...]] = (CONTROLNET_PAPER,)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
