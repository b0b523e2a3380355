"""Settings of InterLCM."""

import math
from typing import ClassVar

from pydantic import Field

from ...errors import UserError
from ...settings import DistanceName, Idle, MethodSettings, NeedsTeacher, Origin, Paper, settings

Range = tuple[float, float]


INTERLCM_PAPER = Paper(
    "InterLCM",
    "InterLCM: Low-Quality Images as Intermediate States of Latent Consistency Models for Effective Blind Face "
    "Restoration",
    "Li, Senmao",
    "2502.02215",
)


@settings
class DegradationSettings:
    """Ranges that a picture's own values are drawn from uniformly. The defaults are InterLCM's, for 512 pixels.

    kernel_size  support of the blur in pixels, odd
    anisotropic  share of pictures with two standard deviations along turned axes
    blur         standard deviations of a Gaussian in pixels
    downsample   the side is divided by this
    noise        standard deviation in 1/255, the same in all channels
    jpeg         quality, a whole number below the upper end
    """

    kernel_size: int = Field(41, ge=1)
    anisotropic: float = Field(0.5, ge=0, le=1)
    blur: Range = (0.1, 10.0)
    downsample: Range = (1.0, 12.0)
    noise: Range = (0.0, 15.0)
    jpeg: tuple[int, int] = (60, 100)

    def check(self, key: str) -> None:
        """UserError for values that no picture can have; `key` is what a message calls these settings."""
        if self.kernel_size % 2 == 0:
            raise UserError(f"{key}.kernel_size: {self.kernel_size} is even; a kernel has a middle")
        for name, least, most in (
            ("blur", 1e-3, math.inf), ("downsample", 1, math.inf), ("noise", 0, 255), ("jpeg", 1, 101),
        ):  # fmt: skip
            low, high = getattr(self, name)
            if not least <= low <= high <= most or (name == "jpeg" and low == high):
                raise UserError(f"{key}.{name}: [{low}, {high}] is no range within {least} .. {most}")


@settings
class PatchSettings:
    """The discriminator of pictures.

    width   channels of the first layer
    layers  strided ones, each of which halves the side
    """

    width: int = Field(64, ge=1)
    layers: int = Field(4, ge=1)


@settings
class VisualSettings:
    """The picture's tokens for the U-Net.

    image_encoder     frozen network that describes the picture in tokens: efflite0, efflite2, or a CLIPVisionModel
    channels          channels of the trained network between its tokens and the U-Net's
    blocks_per_level  blocks of that network at each level
    """

    image_encoder: str = "openai/clip-vit-base-patch16"
    channels: tuple[int, ...] = (128, 256, 512)
    blocks_per_level: int = Field(2, ge=1)


@settings
class InterLCMSettings(MethodSettings):
    """Values of the released code (options/interlcm.yml).

    degradation        how pictures are damaged
    num_steps          steps of the student's schedule; the one-step variant has 2
    timesteps          times of the student's schedule, in place of num_steps
    start_index        index of the step whose state the picture makes; the network runs from it to the last
    guidance_scale     guidance that a guidance-embedding student is told; null for that of its sampling.json
    visual             tokens of the picture in place of the prompt's; null for the empty prompt's
    spatial            whether a ControlNet sees the picture
    l1_weight          weight of the mean absolute difference
    perceptual         network of the perceptual loss: lpips-imagenet as the released code calls VGG's LPIPS, lpips as
                       its package does, or efflite0 and efflite2, which ordinary packages carry
    perceptual_weight  weight of the perceptual loss
    gan_weight         weight of -D(restored); 0: no discriminator
    gan_start_step     iterations before the discriminator joins
    discriminator      network of the discriminator
    discriminator_lr   learning rate of the discriminator; null for the run's
    """

    degradation: DegradationSettings = Field(default_factory=DegradationSettings)
    num_steps: int = Field(4, ge=2)
    timesteps: tuple[int, ...] | None = None
    start_index: int = Field(1, ge=1)
    guidance_scale: float | None = Field(None, ge=1)
    visual: VisualSettings | None = Field(default_factory=VisualSettings)
    spatial: bool = True
    l1_weight: float = Field(1.0, ge=0)
    perceptual: DistanceName = "lpips-imagenet"
    perceptual_weight: float = Field(1.0, ge=0)
    gan_weight: float = Field(0.1, ge=0)
    gan_start_step: int = Field(10001, ge=0)
    discriminator: PatchSettings = Field(default_factory=PatchSettings)
    discriminator_lr: float | None = Field(None, gt=0)

    idea: ClassVar[str] = "faces restored from a middle state of a few-step student"
    origin: ClassVar[Origin | None] = Origin("restoration", INTERLCM_PAPER)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.num_steps", "method.timesteps", only=(None,)),
        Idle("method.perceptual", "method.perceptual_weight", values=(0,)),
        Idle("method.gan_start_step method.discriminator.width method.discriminator.layers method.discriminator_lr",
             "method.gan_weight", values=(0,)),
        Idle("method.gan_start_step", "max_train_steps", longer=True),
    )  # fmt: skip
