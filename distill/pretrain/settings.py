"""Settings of the stages that train the embedded teachers."""

from typing import Any, ClassVar

from pydantic import Field

from ..methods.control.controls import SpatialControl
from ..settings import MethodSettings, NeedsTeacher, Origin, Paper, settings

EDM_PAPER = Paper(
    "EDM",
    "Elucidating the Design Space of Diffusion-Based Generative Models",
    "Karras, Tero",
    "2206.00364",
)
DDPM_PAPER = Paper(
    "DDPM",
    "Denoising Diffusion Probabilistic Models",
    "Ho, Jonathan",
    "2006.11239",
)
LDM_PAPER = Paper(
    "LDM",
    "High-Resolution Image Synthesis with Latent Diffusion Models",
    "Rombach, Robin",
    "2112.10752",
)
CONTROLNET_PAPER = Paper(
    "ControlNet",
    "Adding Conditional Control to Text-to-Image Diffusion Models",
    "Zhang, Lvmin",
    "2302.05543",
)


@settings
class SharedSettings:
    """What all stages of a teacher share.

    data        as of a run; a stage may have its own
    resolution  as of a run; a stage may have its own
    name        title of the card; null for that of output_dir
    license     of the card
    """

    data: dict[str, Any] | None = None
    resolution: int | None = Field(None, ge=1, le=16384)
    name: str | None = None
    license: str = "other"


@settings
class DiffusionSettings(MethodSettings):
    """Of a latent diffusion model.

    caption_dropout  share of samples trained without their prompt
    snr_gamma        min-SNR weighting of the epsilon loss (arXiv 2303.09556, eq. 6), min(SNR, gamma)/SNR; null for
                     equal weights
    guidance_scale   guidance of the pictures and of sampling.json
    """

    caption_dropout: float = 0.1
    snr_gamma: float | None = None
    guidance_scale: float = 3.0

    idea: ClassVar[str] = "trains a latent diffusion teacher"
    origin: ClassVar[Origin | None] = Origin("teachers", DDPM_PAPER)
    ignores: ClassVar[tuple[str, ...]] = (
        "student.init",
        "student.network",
        "student.norm",
        "student.prediction",
        "student.conversion_steps",
    )
    needs_teacher: ClassVar[NeedsTeacher] = "always"


@settings
class EDMSettings(MethodSettings):
    """Defaults are EDM's (table 1).

    p_mean               mean of ln sigma in training
    p_std                standard deviation of ln sigma in training
    sigma_min            where sampling ends
    sigma_max            where sampling starts
    sigma_data           the data's standard deviation per element
    rho                  bends the grid of sampling
    num_inference_steps  steps of Heun's solver, in pictures and sampling.json
    """

    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    rho: float = Field(7.0, gt=0)
    num_inference_steps: int = Field(18, ge=1)

    idea: ClassVar[str] = "trains a pixel teacher"
    origin: ClassVar[Origin | None] = Origin("teachers", EDM_PAPER)
    ignores: ClassVar[tuple[str, ...]] = ("teacher", "student.prediction", "student.conversion_steps")


@settings
class AutoencoderSettings(MethodSettings):
    """Of a small AutoencoderKL.

    block_out_channels  channels of its levels
    layers_per_block    residual layers of a level
    latent_channels     channels of a latent
    l1_weight           weight of the mean absolute error
    l2_weight           weight of the mean squared error
    kl_weight           weight of the mean KL divergence per latent element
    max_shift           augmentation by so many whole pixels
    recolour            share of images whose colour channels are permuted
    """

    block_out_channels: tuple[int, ...] = (32, 64, 64)
    layers_per_block: int = 1
    latent_channels: int = 4
    l1_weight: float = 1.0
    l2_weight: float = 2.0
    kl_weight: float = 1e-3
    max_shift: int = 2
    recolour: float = 0.3

    idea: ClassVar[str] = "trains a small autoencoder"
    origin: ClassVar[Origin | None] = Origin("teachers", LDM_PAPER)
    ignores: ClassVar[tuple[str, ...]] = (
        "teacher",
        "student",
        "validation_steps",
        "validation_prompts",
        "compile",
    )


@settings
class TextEncoderSettings(MethodSettings):
    """Of a small CLIPTextModel and its tokenizer.

    vocabulary_size   byte-pair tokens
    hidden_size       width of the encoder
    num_layers        its blocks
    num_heads         its attention heads
    max_length        tokens of a prompt
    num_words         training phrases of single words, beside the captions
    num_edits         training phrases that are captions with one word changed
    num_combinations  training phrases of two or three words at random
    phrases_per_caption  for each distinct caption at most so many phrases of each of these kinds
    """

    vocabulary_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 16
    num_words: int = 8000
    num_edits: int = 6000
    num_combinations: int = 10000
    phrases_per_caption: int = Field(12, ge=1)

    idea: ClassVar[str] = "trains a small text encoder towards MiniLM's sentence vectors"
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
    """Of a ControlNet.

    control          what the adapter sees of a picture, by its name and that control's own keys
    caption_dropout  share of samples trained without their prompt; the paper's
    guidance_scale   guidance of the pictures and of sampling.json
    """

    control: SpatialControl
    caption_dropout: float = Field(0.5, ge=0, lt=1)
    guidance_scale: float = Field(3.0, ge=1)

    idea: ClassVar[str] = "trains a ControlNet on pictures"
    origin: ClassVar[Origin | None] = Origin("control", CONTROLNET_PAPER)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
