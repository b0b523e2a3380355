"""InterLCM: restoration from an intermediate state of a frozen few-step student (arXiv 2502.02215)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....pipelines.export import Export, in_float32
from ....pipelines.pipeline_restoration import RestorationPipeline
from ....pipelines.visual_encoder import VisualEncoder
from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...diffusion.generator import Generator, fresh_from, seeded
from ...diffusion.losses import hinge_critic, hinge_generator, mean_distance
from ...errors import UserError
from ...models.frozen import frozen, weights_hash
from ...models.one_step import controlnet_of
from ...scorers.vision import ImageEncoder
from ...training.contract import Batch, Method, Parts, Progress, Rehearsal
from ...training.notes import Notes
from .degradation import Degradation
from .patch_discriminator import PatchDiscriminator
from .restorer import Restorer
from .settings import InterLCMSettings, VisualSettings


class InterLCM(Method):
    """L1 + perceptual + adversarial loss of the decoded picture, through every remaining step, the noise between them
    and the decoder, into the visual and the spatial encoder.

    Players: restorer, which is both encoders, then from gan_start_step on the discriminator of the same pictures.
    """

    Settings = InterLCMSettings
    needs = frozenset({"images"})

    def __init__(self, settings: InterLCMSettings, parts: Parts):
        super().__init__(settings, parts)
        s = settings
        parts.need_no_student("the few-step student is frozen here and named by teacher.path")
        if s.visual is None and not s.spatial:
            raise UserError(
                "method.spatial: false leaves nothing to train beside method.visual null; set one"
            )
        s.degradation.check("method.degradation")
        self.degradation = Degradation(**vars(s.degradation))
        self.teacher = parts.need_latent_teacher()
        self.restorer = Restorer(
            self.teacher, s.num_steps, timesteps=s.timesteps, guidance_scale=s.guidance_scale
        )
        self.restorer.check(s.start_index)
        shapes = self.teacher.family.shapes()
        if set(shapes) != {"encoder_hidden_states"}:
            kind = type(self.teacher.pipeline).__name__
            raise UserError(
                f"teacher.path: a {kind} is told more than one text; give one of Stable Diffusion 1 or 2"
            )
        self.spatial = controlnet_of(self.teacher) if s.spatial else None
        self.visual: VisualEncoder | None = None
        self.image_encoder: ImageEncoder | None = None
        if s.visual is not None:
            tokens, width = shapes["encoder_hidden_states"]
            self.image_encoder = parts.vision.encoder(s.visual.image_encoder)
            self.visual = visual_encoder(s.visual, self.image_encoder.num_tokens, tokens, width)
        self.perceptual = parts.vision.distance(s.perceptual) if s.perceptual_weight else None
        self.discriminator = (
            PatchDiscriminator(s.discriminator, self.teacher.resolution) if s.gan_weight else None
        )

    def players(self) -> dict[str, list[nn.Parameter]]:
        encoders = [m for m in (self.visual, self.spatial) if m is not None]
        out = {"restorer": [p for m in encoders for p in m.parameters()]}
        if self.discriminator is not None:
            out["discriminator"] = list(self.discriminator.parameters())
        return out

    def optimiser(self, player: str) -> dict[str, Any]:
        lr = self.settings.discriminator_lr
        return {} if player == "restorer" or lr is None else {"lr": lr}

    def passed_through(self) -> list[nn.Module]:
        return [self.teacher.family.network, self.teacher.vae]

    def turns(self, progress: Progress) -> tuple[str, ...]:
        joined = self.discriminator is not None and progress.iteration >= self.settings.gan_start_step
        return ("restorer", "discriminator") if joined else ("restorer",)

    def forward(
        self, player: str, batch: Batch, progress: Progress, carry: dict[str, Any]
    ) -> dict[str, Tensor]:
        if player == "discriminator":
            assert self.discriminator is not None
            judged = (self.discriminator(carry[side]) for side in ("real", "restored"))
            return {"loss": hinge_critic(*judged)}
        assert batch.images is not None
        s, draws, wanted = self.settings, batch.draws, batch.images
        degraded = self.degradation(wanted, draws)
        restored = self.restored(degraded, lambda x: draws.normal(x.shape[1:])).float()
        l1 = mean_distance("l1", restored, wanted).mean()
        out = {"loss": s.l1_weight * l1, "l1": l1}
        if self.perceptual is not None:
            out["perceptual"] = self.perceptual(restored, wanted).mean()
            out["loss"] = out["loss"] + s.perceptual_weight * out["perceptual"]
        if "discriminator" in self.turns(progress):
            assert self.discriminator is not None
            carry["real"], carry["restored"] = wanted, restored.detach()
            with frozen(self.discriminator.parameters()):
                out["adversarial"] = hinge_generator(self.discriminator(restored))
            out["loss"] = out["loss"] + s.gan_weight * out["adversarial"]
        return out

    def restored(self, degraded: Tensor, fresh: Callable[[Tensor], Tensor]) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1], of degraded ones."""
        z = self.restorer.latents(degraded)
        x0 = self.restorer(
            z, self.condition(degraded), fresh, self.settings.start_index, self.spatial, degraded
        )
        return self.teacher.decode(x0)

    def condition(self, degraded: Tensor) -> Condition:
        """What both networks are told: the picture's tokens, or the empty prompt's."""
        if self.visual is not None:
            assert self.image_encoder is not None
            return Condition({"encoder_hidden_states": self.visual(self.image_encoder(degraded))}, {})
        empty = {k: v.to(degraded.device) for k, v in self.teacher.encode_empty().items()}
        return Condition({k: v.expand(len(degraded), *v.shape[1:]) for k, v in empty.items()}, empty)

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int) -> dict[str, Tensor]:
        """The frozen student's own samples, degraded, restored."""
        device, count = self.teacher.vae.device, len(captions)
        fresh = fresh_from(seeded(count, seed))
        noise = fresh(torch.empty(count, *self.teacher.shape, device=device))
        told = self.restorer.told(self.teacher.condition(captions).to(device))
        sample = Generator(self.restorer.function, self.restorer.timesteps)(noise, told, fresh)
        clean = self.teacher.decode(sample).float().clamp(-1, 1)
        degraded = self.degradation(clean, Draws(seed, 0, range(count), device))
        return {"student": clean, "degraded": degraded, "restored": self.restored(degraded, fresh)}

    @torch.no_grad()
    def rehearsal(self, captions: list[str], num_steps: int, generators: list[torch.Generator]) -> Rehearsal:
        """Of a picture whose values rise evenly."""
        side, device = self.teacher.resolution, self.teacher.vae.device
        picture = torch.linspace(0, 1, 3 * side**2, device=device).view(1, 3, side, side)
        seen = 2 * picture - 1
        x0 = self.restorer(
            self.restorer.latents(seen),
            self.condition(seen),
            fresh_from(generators),
            self.settings.start_index,
            self.spatial,
            seen,
        )
        return Rehearsal(x0, {"image": picture})

    def export(self) -> Export:
        """RestorationPipeline; its controlnet/ and visual_encoder/ are what was trained."""
        s, old = self.settings, self.teacher.pipeline
        frozen_parts = in_float32({"unet": self.teacher.family.network, "vae": self.teacher.vae})
        told: dict[str, Any] = {"text_encoder": old.text_encoder, "tokenizer": old.tokenizer}
        if self.image_encoder is not None:
            told = {
                "visual_encoder": self.visual,
                "image_encoder": self.image_encoder.network,
                "image_input": self.image_encoder.image_input,
            }
        call = self.restorer.call(s.start_index)
        pipeline = RestorationPipeline(
            **frozen_parts,
            scheduler=self.restorer.scheduler,
            controlnet=self.spatial,
            **in_float32(told),
            **call,
        )
        notes = {
            "student": Path(self.teacher.path).name,
            "student_hash": weights_hash(self.teacher.family.network),
            "degradation": s.degradation.__dict__,
            **call,
        }
        steps = len(self.restorer.timesteps) - s.start_index
        return Export(pipeline, beside=[Notes("restoration.json", notes)], sampling={str(steps): call})


def visual_encoder(chosen: VisualSettings, in_tokens: int, out_tokens: int, out_width: int) -> VisualEncoder:
    """Raises UserError for channels without 32 groups."""
    if not chosen.channels or any(c % 32 for c in chosen.channels):
        raise UserError(
            f"method.visual.channels: {list(chosen.channels)} are no multiples of 32, the groups of its norms"
        )
    return VisualEncoder(in_tokens, out_tokens, out_width, chosen.channels, chosen.blocks_per_level)
