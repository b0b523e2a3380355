"""One teacher step t -> s."""

from torch import Tensor

from .process import NoiseProcess


def ddim_step(x0: Tensor, eps: Tensor, process: NoiseProcess, s: Tensor) -> Tensor:
    """x_s = alpha(s) x0 + sigma(s) eps: DDIM with eta 0 (arXiv 2010.02502, eq. 12). x0, eps (B, ...), s (B,)."""
    return process.noised(x0, eps, s)
