"""Latent consistency distillation (LCM, arXiv 2310.04378; with a LoRA student LCM-LoRA, arXiv 2311.05556)."""

from torch import Tensor

from ...diffusion.condition import Condition
from ...diffusion.draws import Draws
from ...diffusion.generator import lcm_timesteps
from ...diffusion.solvers import ddim_step
from ...errors import UserError
from .base import LatentConsistency
from .settings import LCDSettings


class LCD(LatentConsistency):
    """z_lo is one guided DDIM step of k times."""

    Settings = LCDSettings

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
