"""Improved distribution matching distillation, DMD2 (arXiv 2405.14867), of image U-Nets."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...errors import UserError
from ...models.frozen import frozen
from ...training.contract import Batch, Parts, Progress
from .base import ScoreDistillation
from .score import matching_loss, native_times
from .settings import DMD2Settings

FEATURE = "mid_block"


class DMD2(ScoreDistillation):
    """The matching loss of rollouts, and a discriminator of renoised samples on the fake score's middle features.

    The fake score and the discriminator's head are one player: it moves in every iteration, the student in every
    student_update_freq-th before it, on the same samples. Losses are means over all elements.
    """

    Settings = DMD2Settings

    def __init__(self, settings: DMD2Settings, parts: Parts):
        s = settings
        if s.min_share >= s.max_share:
            raise UserError(f"method.min_share: {s.min_share} is not below method.max_share {s.max_share}")
        super().__init__(s, parts, sigma_data=s.sigma_data, taught=True, scored=True)
        self.head = head_of(parts.need_teacher().denoiser.network) if s.gan_weight else None

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
