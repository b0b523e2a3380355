"""Improved distribution matching distillation, DMD2 (arXiv 2405.14867), of image U-Nets."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import Field
from torch import Tensor, nn

from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...errors import UserError
from ...models.frozen import frozen
from ...settings import Idle, StudentSettings, settings
from ...training.contract import Batch, Parts, Progress, Published
from .base import ScoreDistillation
from .score import matching_loss, native_times

FEATURE = "mid_block"
PUBLISHED = (
    Published(
        "ImageNet 64 x 64, class-conditional", "FID", 1, 1.28, "DMD2 paper, abstract as its README quotes it"
    ),
    Published("zero-shot COCO 2014, SD 1.5", "FID", 1, 8.35, "DMD2 paper, abstract as its README quotes it"),
)


@settings
class DMD2Settings:
    """Values of the released code (tianweiy/DMD2); of SDXL's four-step recipe where recipes differ.

    num_steps            at i / num_steps of the teacher's time; rollouts end at each of them in turn
    student_update_freq  fake-score steps per student step: 5, in SD 1.5's recipe 10 (dfake_gen_update_ratio)
    fake_score_lr        of fake score and discriminator, as the run's unless given
    min_share, max_share the share of the teacher's time where the scores are compared (min, max_step_percent)
    gan_weight           of -log D(G) in the student's loss (gen_cls_loss_weight: SDXL 5e-3, SD 1.5 1e-3);
                         0: no discriminator
    critic_weight        of the discriminator's loss in the fake score's (guidance_cls_loss_weight)
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

    idle: ClassVar[tuple[Idle, ...]] = (Idle("method.critic_weight", "method.gan_weight", values=(0,)),)


class DMD2(ScoreDistillation):
    """The matching loss of rollouts, and a discriminator of renoised samples on the fake score's middle features.

    The fake score and the discriminator's head are one player: it moves in every iteration, the student in every
    student_update_freq-th before it, on the same samples. Losses are means over all elements.
    """

    Settings = DMD2Settings
    published = PUBLISHED

    def __init__(self, settings: DMD2Settings, parts: Parts):
        s = settings
        if s.min_share >= s.max_share:
            raise UserError(f"method.min_share: {s.min_share} is not below method.max_share {s.max_share}")
        super().__init__(s, parts, sigma_data=s.sigma_data, taught=True, scored=True)
        self.head = head_of(parts.need_teacher().denoiser.network) if s.gan_weight else None

    @classmethod
    def needs_teacher(cls, student: StudentSettings) -> bool:
        return True

    def players(self) -> dict[str, list[nn.Parameter]]:
        out = super().players()
        if self.head is not None:
            out["fake_score"] += list(self.head.parameters())
        return out

    def turns(self, progress: Progress) -> tuple[str, ...]:
        moves = progress.iteration % self.settings.student_update_freq == 0
        return ("student", "fake_score") if moves else ("fake_score",)

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        s, draws, told = self.settings, batch.draws, self.space.told(batch)
        num_steps = progress.updates[player] % s.num_steps + 1
        if player == "student":
            sample = self.rollout(draws, told, num_steps)
            carry["sample"] = sample.detach()
            t = self.native(draws, s.min_share, s.max_share)
            matching = 0.5 * matching_loss(sample, *self.scores(sample, t, told, draws)).mean() / size(sample)
            out = {"loss": matching, "matching": matching}
            if self.head is not None:
                with frozen(self.head.parameters()):
                    out["adversarial"] = F.softplus(-self.judged(sample, told, draws, graded=False)).mean()
                out["loss"] = matching + s.gan_weight * out["adversarial"]
            return out
        assert self.fake_score is not None
        if "sample" not in carry:
            with torch.no_grad():
                carry["sample"] = self.rollout(draws, told, num_steps)
        sample, t = carry["sample"], self.native(draws)
        x, eps = self.noised(sample, t, draws)
        score = (self.fake_score(self.process, x, t, told).eps - eps).square().mean()
        out = {"loss": score, "score": score}
        if self.head is not None:
            real = self.judged(self.space.samples(batch).double(), told, draws)
            out["critic"] = F.softplus(-real).mean() + F.softplus(self.judged(sample, told, draws)).mean()
            out["loss"] = score + s.critic_weight * out["critic"]
        return out

    def judged(self, x0: Tensor, told: Condition, draws: Draws, graded: bool = True) -> Tensor:
        """The discriminator's logits (B,) of samples noised to new times; `graded`: with gradients of its network."""
        assert self.fake_score is not None and self.head is not None
        t = self.native(draws)
        x, _ = self.noised(x0, t, draws)
        seen = self.fake_score(self.process, x, t, told, features=(FEATURE,), frozen=not graded)
        return self.head(seen.features[FEATURE].float()).flatten()

    def native(self, draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
        teacher = self.parts.need_teacher().denoiser.process
        return native_times(draws, self.process, teacher, low, high).clamp(*self.within)

    def sampling_times(self) -> list[float]:
        n, teacher = self.settings.num_steps, self.parts.need_teacher().denoiser.process
        shares = torch.tensor([(n - i) / n for i in range(n)], dtype=torch.float64, device="cpu")
        return self.process.time_of(teacher.log_snr(teacher.share(shares))).tolist()

    def rollout_times(self, draws: Draws, num_steps: int) -> list[Tensor]:
        rows = torch.ones(len(draws.generators), dtype=torch.float64, device=draws.device)
        return [time * rows for time in self.sampling.times[:num_steps]]


def size(x: Tensor) -> int:
    """Elements of a sample."""
    return x[0].numel()


def head_of(network: nn.Module) -> nn.Sequential:
    """Strided convolutions of a U-Net's middle features down to one logit, as the official head for its size."""
    if not isinstance(network, UNet2DConditionModel | UNet2DModel):
        raise UserError(
            f"method.gan_weight: a {type(network).__name__} has no middle block to judge by; set it to 0"
        )
    config: Any = network.config
    width, groups = config.block_out_channels[-1], config.norm_num_groups
    side = config.sample_size // 2 ** (len(config.block_out_channels) - 1)
    layers: list[nn.Module] = []
    while side > 4:
        layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.GroupNorm(groups, width), nn.SiLU()]
        side //= 2
    layers += [nn.Conv2d(width, width, side), nn.GroupNorm(groups, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
