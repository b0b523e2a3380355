"""Attention with a forward-mode derivative from ordinary torch operators: CPU, MPS, and float64 on any device.

A chunk of queries sees all its keys at once, so that a softmax row is never split; extra memory is bounded by
`ELEMENTS` per score matrix and linear in the number of keys beyond. Half precision is computed in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .naive import lse_dtype

ELEMENTS = {"cpu": 2**16}
"""Size of a chunk's score matrix by device type, others OTHER_ELEMENTS: on a CPU, S and tS should stay in its cache."""
OTHER_ELEMENTS = 2**25
MIN_ROWS = 32

Slices = tuple[int, slice, slice]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    bias: Tensor | None,
    tbias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """O = P V and tO = (H - diag(mu) P) V + P tV with H = P * tS, mu = rowsum H (arXiv 2410.11081, appendix F).

    q, tq (B, H, Lq, D), k, tk (B, H, Lk, D), v, tv (B, H, Lk, Dv); bias and tbias broadcast to (B, H, Lq, Lk), and
    bias may be boolean (True is seen). Returns O, tO (None without tangents) in q's dtype and LSE (B, H, Lq) in
    float32, or float64 for float64.
    """
    has_ts = tq is not None or tk is not None or tbias is not None
    has_tangent = has_ts or tv is not None
    if not has_tangent and fused_cpu_applies(q, k, v, bias, is_causal, scale):
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, 0.0, is_causal, scale=scale)
        return out.contiguous(), None, lse.contiguous()
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    tangent = torch.zeros_like(out) if has_tangent else None
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype(q))
    if k.shape[2] == 0:
        return out, tangent, lse
    scores = Scores(q, k, bias, is_causal)
    for heads in scores.head_groups():
        kg, vg = scores.widen(k[heads]), scores.widen(v[heads])
        tkg = None if tk is None else scores.widen(tk[heads])
        tvg = None if tv is None else scores.widen(tv[heads])
        for at, n in scores.row_chunks(heads):
            qc = scores.widen(q[at]) * scale
            p, hidden = scores.of(qc, kg[:, :n], at)
            top = p.amax(-1, keepdim=True)
            if hidden is not None:
                top.masked_fill_(top == -torch.inf, 0.0)
            p.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            lse[at] = (top + total.log()).squeeze(-1)
            norm = total if hidden is None else total.masked_fill_(total == 0, 1.0)
            primal = torch.bmm(p, vg[:, :n]).div_(norm)
            out[at] = primal
            if tangent is None:
                continue
            change = None
            if has_ts:
                h = scores.second(p)
                scores.product(h, None if tq is None else scores.widen(tq[at]) * scale, kg[:, :n], first=True)
                scores.product(h, qc, None if tkg is None else tkg[:, :n], first=tq is None)
                if tbias is not None:
                    first = tq is None and tk is None
                    h.copy_(scores.window(tbias, at, n)) if first else h.add_(scores.window(tbias, at, n))
                if hidden is not None:
                    h.masked_fill_(hidden, 0.0)
                h.mul_(p)
                h.addcmul_(p, h.sum(-1, keepdim=True).div_(norm), value=-1)
                # The row sum that rounding left in H would meet V's mean.
                change = torch.bmm(h, vg[:, :n]).addcmul_(h.sum(-1, keepdim=True), primal, value=-1)
            if tvg is not None:
                moved = torch.bmm(p, tvg[:, :n])
                change = moved if change is None else change.add_(moved)
            assert change is not None
            tangent[at] = change.div_(norm)
    return out, tangent, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dQ, dK, dV and, if `bias_grad`, dBias of the primal from its O and LSE (arXiv 2307.08691, algorithm 2).

    P = exp(S - LSE), dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale dS^T Q. P is divided
    by its row sum, which rounding moves from 1 where |LSE| is large (a bias of -1e9 on a whole row).
    """
    if not bias_grad and fused_cpu_applies(q, k, v, bias, is_causal, scale):
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        saved = out.contiguous(), lse.contiguous()
        dq, dk, dv = fused(grad_out.contiguous(), q, k, v, *saved, 0.0, is_causal, scale=scale)
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), None
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = None
    if bias is not None and bias_grad:
        dbias = torch.zeros(bias.shape, dtype=lse_dtype(q), device=q.device)
    if k.shape[2] == 0:
        return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype)
    scores = Scores(q, k, bias, is_causal)
    for heads in scores.head_groups():
        kg, vg = scores.widen(k[heads]), scores.widen(v[heads])
        dkg, dvg = torch.zeros_like(kg), torch.zeros_like(vg)
        for at, n in scores.row_chunks(heads):
            qc, do = scores.widen(q[at]) * scale, scores.widen(grad_out[at])
            p, hidden = scores.of(qc, kg[:, :n], at)
            row_lse = lse[at].unsqueeze(-1)
            p.sub_(row_lse if hidden is None else row_lse.masked_fill(row_lse == -torch.inf, 0.0)).exp_()
            total = p.sum(-1, keepdim=True)
            p.div_(total if hidden is None else total.masked_fill_(total == 0, 1.0))
            dvg[:, :n].baddbmm_(p.mT, do)
            ds = scores.second(p)
            scores.product(ds, do, vg[:, :n], first=True)
            if hidden is not None:
                ds.masked_fill_(hidden, 0.0)
            ds.sub_((do * scores.widen(out[at])).sum(-1, keepdim=True)).mul_(p)
            dq[at] = torch.bmm(ds, kg[:, :n]).mul_(scale)
            dkg[:, :n].baddbmm_(ds.mT, qc)
            if dbias is not None:
                target = scores.window(dbias, at, n)
                target.add_(ds.sum_to_size(target.shape))
        dk[heads], dv[heads] = dkg, dvg
    return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype)


class Scores:
    """Walks over chunks of the score matrix and computes them into two buffers that all chunks share."""

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool):
        self.shape = (*q.shape[:3], k.shape[2])
        self.bias, self.is_causal, self.dtype = bias, is_causal, lse_dtype(q)
        limit = ELEMENTS.get(q.device.type, OTHER_ELEMENTS)
        _, num_heads, lq, lk = self.shape
        self.rows = max(1, min(lq, max(MIN_ROWS, limit // lk)))
        self.heads = min(num_heads, max(1, limit // (self.rows * lk)))
        self.buffers = torch.empty(2, self.heads * self.rows * lk, dtype=self.dtype, device=q.device)

    def head_groups(self) -> Iterator[tuple[int, slice]]:
        batch, num_heads, lq, _ = self.shape
        if lq:
            for b in range(batch):
                for h in range(0, num_heads, self.heads):
                    yield b, slice(h, min(h + self.heads, num_heads))

    def row_chunks(self, heads: tuple[int, slice]) -> Iterator[tuple[Slices, int]]:
        """Index of a chunk of queries, and the number of keys that it may see."""
        _, _, lq, lk = self.shape
        for i in range(0, lq, self.rows):
            end = min(i + self.rows, lq)
            yield (*heads, slice(i, end)), min(end, lk) if self.is_causal else lk

    def widen(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def of(self, qc: Tensor, keys: Tensor, at: Slices) -> tuple[Tensor, Tensor | None]:
        """S (heads, rows, keys) with -inf where hidden, and the hidden pairs; None where no mask can hide any."""
        s = self.buffers[0, : qc.shape[0] * qc.shape[1] * keys.shape[1]].view(*qc.shape[:2], keys.shape[1])
        torch.bmm(qc, keys.mT, out=s)
        if self.bias is not None:
            window = self.window(self.bias, at, keys.shape[1])
            if window.dtype == torch.bool:
                hidden = ~window
                return s.masked_fill_(hidden, -torch.inf), hidden
            s.add_(window)
            return s, s == -torch.inf
        if self.is_causal:
            hidden = self.later(at[2], s)
            return s.masked_fill_(hidden, -torch.inf), hidden
        return s, None

    def later(self, rows: slice, s: Tensor) -> Tensor:
        """Causal mask counted from the top left, as in SDPA: query i sees the keys up to i."""
        queries = torch.arange(rows.start, rows.stop, device=s.device).unsqueeze(-1)
        return torch.arange(s.shape[-1], device=s.device) > queries

    def window(self, x: Tensor, at: Slices, num_keys: int) -> Tensor:
        """The chunk's part, a view, of a tensor that broadcasts to the score matrix."""
        b, *rest = (*at, slice(num_keys))
        part = x[b if x.shape[0] > 1 else 0]
        return part[tuple(i if n > 1 else slice(None) for i, n in zip(rest, part.shape, strict=True))]

    def second(self, like: Tensor) -> Tensor:
        return self.buffers[1, : like.numel()].view(like.shape)

    @staticmethod
    def product(out: Tensor, rows: Tensor | None, keys: Tensor | None, first: bool) -> None:
        """out = rows keys^T, or added to it; nothing if a factor is missing."""
        if rows is None or keys is None:
            return
        if first:
            torch.bmm(rows, keys.mT, out=out)
        else:
            out.baddbmm_(rows, keys.mT)


def fused_cpu_applies(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> bool:
    """ATen's fused CPU attention: no mask (its LSE of a fully masked row is 0), one head size, nothing empty; causal
    only with a positive scale, which it multiplies the hidden scores of -inf by."""
    return (
        q.device.type == "cpu"
        and bias is None
        and (scale > 0 or not is_causal)
        and q.shape[-1] == v.shape[-1]
        and all(x.numel() > 0 and x.stride(-1) == 1 for x in (q, k, v))
    )
