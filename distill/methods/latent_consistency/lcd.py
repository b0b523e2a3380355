"""Latent consistency distillation (LCM, arXiv 2310.04378; with a LoRA student LCM-LoRA, arXiv 2311.05556)."""

from pydantic import Field
from torch import Tensor

from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...diffusion.generator import lcm_timesteps
from ...diffusion.solvers import ddim_step
from ...errors import UserError
from ...settings import settings
from ...training.contract import Published
from .base import LatentConsistency, LatentConsistencySettings

TABLE = "LCM paper, guidance scale 8, SD 2.1; {}"
PUBLISHED = tuple(
    Published(f"LAION-Aesthetics {side} px", "FID", steps, value, TABLE.format(certainty))
    for side, values, certainty in (
        (768, (34.2, 16.3, 13.5), "values recalled, in agreement with the repository's speed_fid.png"),
        (512, (35.4, 13.3, 11.1), "values recalled, not checked"),
    )
    for steps, value in zip((1, 2, 4), values, strict=True)
)


@settings
class LCDSettings(LatentConsistencySettings):
    """num_ddim_timesteps: N, the teacher's steps are k = T/N long."""

    num_ddim_timesteps: int = Field(50, ge=1)


class LCD(LatentConsistency):
    """z_lo is one guided DDIM step of k times."""

    Settings = LCDSettings
    published = PUBLISHED

    def sampling_grid(self) -> list[int]:
        n = self.settings.num_ddim_timesteps
        if self.total % n:
            raise UserError(
                f"method.num_ddim_timesteps: {n} does not divide the teacher's {self.total} steps"
            )
        return lcm_timesteps(n, n, self.total)[::-1]

    def training_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        skip = self.total // self.settings.num_ddim_timesteps
        t_hi = ((draws.integers(0, self.settings.num_ddim_timesteps) + 1) * skip - 1).double()
        return t_hi, (t_hi - skip).clamp(min=0)

    def teacher_step(
        self, z: Tensor, t_hi: Tensor, t_lo: Tensor, condition: Condition, w: Tensor, draws: Draws
    ) -> Tensor:
        x0, eps = self.guide(z, t_hi, condition, w)
        return ddim_step(x0, eps, self.process, t_lo)
