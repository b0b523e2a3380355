"""Reward guided latent consistency distillation (RG-LCD, arXiv 2403.11027), with Ctrl-U's weighting as a switch."""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.frozen import frozen
from ...training.contract import Batch, Parts, Progress
from .base import Step
from .latent_reward import LatentReward, contrastive_loss, pair_accuracy, preference_loss
from .lcd import LCD
from .settings import RGLCDSettings
from .uncertainty import uncertainty_weighted


class RGLCD(LCD):
    """LCD's loss less beta times the reward of the same single-step prediction, whatever its time and omega.

    With the proxy, players: latent_clip (contrastive training of the proxy, before all else), student, lrm (the proxy
    learns the expert's preferences among prediction, target and data). The reward never sees the target's gradient.
    """

    Settings = RGLCDSettings

    def __init__(self, settings: RGLCDSettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        u = s.uncertainty
        if u is not None and u.t_min is not None and u.t_max is not None and u.t_min > u.t_max:
            raise UserError(
                f"method.uncertainty.t_min: {u.t_min} is above t_max {u.t_max}, no sample would be rewarded; swap them"
            )
        self.reward = parts.reward(s.reward)
        self.lrm = None
        if s.lrm is not None:
            channels, side, _ = self.teacher.shape
            if parts.resolution is not None:
                side = parts.resolution // self.teacher.pipeline.vae_scale_factor
            width = self.teacher.pipeline.unet.config.cross_attention_dim
            self.lrm = LatentReward((channels, side, side), width, s.lrm)

    def players(self) -> dict[str, list[nn.Parameter]]:
        student = super().players()
        if self.lrm is None:
            return student
        return {**student, "latent_clip": list(self.lrm.parameters()), "lrm": self.lrm.unlocked()}

    def optimiser(self, player: str) -> dict[str, Any]:
        if player == "student":
            return {}
        s = self.settings.lrm
        return {"lr": s.learning_rate if player == "lrm" else s.pretrain_lr}

    def turns(self, progress: Progress) -> tuple[str, ...]:
        if self.lrm is None:
            return ("student",)
        start = self.settings.lrm.pretrain_steps
        if start >= progress.total:
            raise UserError(
                f"method.lrm.pretrain_steps: {start} leaves the student none of the {progress.total} "
                "max_train_steps; lower it"
            )
        return ("latent_clip",) if progress.iteration < start else ("student", "lrm")

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        if player == "latent_clip":
            return self.contrast(batch)
        if player == "lrm":
            return self.match(batch, carry["candidates"])
        s, step = self.settings, self.step(batch)
        if self.lrm is not None:
            carry["candidates"] = torch.stack([step.prediction.detach(), step.target, step.z0])
        distance = self.distance(step)
        reward = self.rewarded(step.prediction, batch)
        out = {"distance": distance, "reward": reward.mean()}
        if s.uncertainty is None:
            return {"loss": distance - s.reward_scale * reward.mean(), **out}
        return {**out, **self.weighted(distance, reward, step, batch, progress)}

    def rewarded(self, latents: Tensor, batch: Batch) -> Tensor:
        """R (B,), with a gradient to the latents and to nothing else."""
        if self.lrm is None:
            return self.reward(self.pictures_of(latents), batch.captions)
        with frozen(self.lrm.parameters()):
            return self.lrm(self.teacher.unscaled(latents), states_of(batch))

    def pictures_of(self, latents: Tensor) -> Tensor:
        """Decoded pictures in [0, 1]; no gradient where they are cut off."""
        return (self.teacher.decode(latents).float() / 2 + 0.5).clamp(0, 1)

    def weighted(
        self, distance: Tensor, reward: Tensor, step: Step, batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """The loss under Ctrl-U: distance + ramp beta mean(C_a exp(-U)) + lambda mean(U)."""
        s, u = self.settings, self.settings.uncertainty
        best = 1.0 if self.lrm is not None else self.reward.best
        other = self.other_view(step, batch)
        cost, disagreement = best - reward, (reward - other).abs() / u.spread
        low = 0 if u.t_min is None else u.t_min
        high = self.total if u.t_max is None else u.t_max
        gate = (step.t_hi >= low) & (step.t_hi <= high)
        if u.weight == "uniform":
            cost, disagreement = (cost + best - other) / 2, torch.zeros_like(disagreement)
        rectified, mean = uncertainty_weighted(cost, disagreement, detach=u.weight == "detached", mask=gate)
        ramp = min(1.0, progress.iteration / u.ramp_steps) if u.ramp_steps else 1.0
        return {
            "loss": distance + ramp * s.reward_scale * rectified + u.penalty * mean,
            "uncertainty": mean,
        }

    def other_view(self, step: Step, batch: Batch) -> Tensor:
        """R_b (B,): of the student's prediction one time later in the same noise, or of the target."""
        if self.settings.uncertainty.pair == "target":
            with torch.no_grad():
                return self.rewarded(step.target, batch)
        later = (step.t_hi + 1).clamp(max=self.total - 1)
        z = self.process.noised(step.z0, step.eps, later)
        return self.rewarded(self.function(z, later, step.condition), batch)

    def contrast(self, batch: Batch) -> dict[str, Tensor]:
        """The proxy's own training: the data's latents against their captions."""
        assert self.lrm is not None and batch.latents is not None
        z0 = self.teacher.latents(batch.latents, batch.draws)
        images = self.lrm.image_vectors(self.teacher.unscaled(z0))
        texts = self.lrm.text_vectors(states_of(batch))
        return {"loss": contrastive_loss(images, texts, self.lrm.scale, batch.captions)}

    def match(self, batch: Batch, candidates: Tensor) -> dict[str, Tensor]:
        """The proxy learns what the expert prefers among (3, B, ...) candidates, which carry no graph."""
        assert self.lrm is not None
        s = self.settings.lrm
        rows, states = candidates[:, : s.batch_size], states_of(batch)[: s.batch_size]
        captions = batch.captions[: s.batch_size]
        with frozen(self.lrm.locked()):
            latent = self.lrm.scale * torch.stack([self.lrm(self.teacher.unscaled(x), states) for x in rows])
        with torch.no_grad():
            scale = self.lrm.scale
            expert = torch.stack([self.reward.logits(self.pictures_of(x), captions, scale) for x in rows])
        loss = preference_loss(expert, latent, s.smooth)
        return {"loss": loss, "pair_accuracy": pair_accuracy(expert, latent.detach())}


def states_of(batch: Batch) -> Tensor:
    """The teacher's text states (B, L, D)."""
    assert batch.condition is not None
    return batch.condition.arguments["encoder_hidden_states"]
