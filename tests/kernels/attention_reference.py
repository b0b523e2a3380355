"""What the attention tests share: the oracle in float64 and inputs."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor
    tk: Tensor
    tv: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in self))

    @property
    def primals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tangents(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tq, self.tk, self.tv


def inputs(
    batch: int = 2, heads: int = 2, lq: int = 7, lk: int = 9, d: int = 8, dv: int | None = None,
    dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = [(lq, d), (lk, d), (lk, dv or d)] * 2
    return Inputs(
        *(
            torch.randn(batch, heads, *shape, dtype=torch.float64, generator=generator).to(dtype).to(device)
            for shape in shapes
        )
    )


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention from full matrices; a fully masked row gives 0."""
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    dead = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(dead, 0.0).softmax(-1)
    return p.masked_fill(dead, 0.0) @ v


def oracle(
    x: Inputs, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """O and tO in float64 from the rounded inputs, by torch's own forward mode over `explicit`."""
    wide = x.to(torch.float64)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return torch.func.jvp(
        lambda q, k, v: explicit(q, k, v, mask, is_causal, scale), wide.primals, wide.tangents
    )


def gradients(
    x: Inputs, grad_out: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in float64, by autograd over `explicit`."""
    wide = x.to(torch.float64)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return torch.func.vjp(lambda q, k, v: explicit(q, k, v, mask, is_causal), *wide.primals)[1](
        grad_out.double()
    )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| in float64."""
    reference = reference.double()
    return float((x.double() - reference).norm() / reference.norm())


def assert_close(name: str, x: Tensor, reference: Tensor, tolerance: float) -> None:
    error = relative_error(x, reference)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"
