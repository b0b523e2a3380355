"""Reverse mode, forward mode and vmap around the operators: one launch computes O and tO."""

import functools
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch import eager_transforms

from .arguments import Problem, check_tangent
from .backends import requested
from .ops import attention_backward, attention_forward

SECOND_ORDER = "call torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) for more."
FORWARD_ONCE = f"attention is differentiated forward once, not jvp of jvp or jvp of grad: {SECOND_ORDER}"
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def differentiable(problem: Problem, bare: bool = False) -> tuple[Tensor, Tensor]:
    """O, which carries a tangent if q, k, v or the bias does, and LSE (B, H, Lq); `bare` as in `launch`."""
    q, k, v, bias, is_causal, scale = problem
    inputs = (q, k, v, bias)
    if forward_ad._current_level < 0 or innermost_is_vmap():
        out, _, lse = launch(problem, (None, None, None, None), bare)
        return out, lse
    if torch.compiler.is_compiling() and eager_transforms.JVP_NESTING > 1:
        raise NotImplementedError(FORWARD_ONCE)
    duals = [None if x is None or not x.is_floating_point() else forward_ad.unpack_dual(x) for x in inputs]
    primals = [x if dual is None else dual.primal for x, dual in zip(inputs, duals, strict=True)]
    tangents = [
        None if dual is None else check_tangent(f"the tangent of {name}", dual.tangent, dual.primal)
        for name, dual in zip(("q", "k", "v", "attn_mask"), duals, strict=True)
    ]
    pq, pk, pv, pbias = primals
    assert pq is not None and pk is not None and pv is not None
    tq, tk, tv, tbias = tangents
    out, tangent, lse = launch(Problem(pq, pk, pv, pbias, is_causal, scale), (tq, tk, tv, tbias), bare)
    return (out if tangent is None else forward_ad.make_dual(out, tangent)), lse


def launch(problem: Problem, tangents: Tangents, bare: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """O, tO (None without tangents) and LSE, differentiable in reverse through O.

    `bare` calls the operator instead of `Attention`, as under torch.compile: what Dynamo makes of an
    autograd.Function differs between versions.
    """
    q, k, v, bias, is_causal, scale = problem
    inputs = (q, k, v, *tangents[:3], bias, tangents[3])
    if bare or torch.compiler.is_compiling():
        if forward_ad._current_level >= 0 and any(has_tangent(x) for x in inputs):
            raise NotImplementedError(FORWARD_ONCE)
        out, tangent, lse = attention_forward(*inputs, is_causal, scale, requested())
    else:
        out, tangent, lse = Attention.apply(*inputs, is_causal, scale, requested())
    return out, None if all(t is None for t in tangents) else tangent, lse


def has_tangent(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, _, _, bias, _, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, bias, output[0], output[2])


def gradients(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    """Of the eleven inputs of `attention_forward`, from the gradient of O."""
    q, k, v, bias, out, lse = ctx.saved_tensors
    is_causal, scale, backend = ctx.settings
    bias_grad = bool(ctx.needs_input_grad[6])
    dq, dk, dv, dbias = Gradient.apply(
        grad_out, q, k, v, bias, out, lse, is_causal, scale, bias_grad, backend
    )
    return dq, dk, dv, None, None, None, dbias if bias_grad else None, None, None, None, None


def batched(
    info: Any, in_dims: tuple[Any, ...], *inputs: Any, bare: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The rule of vmap: the mapped dimension joins the batch; tangents that live below the map are found there."""
    is_causal, scale, _ = inputs[8:]
    q, k, v, tq, tk, tv, bias, tbias = join_batch(inputs[:8], in_dims, info.batch_size)
    problem = Problem(q, k, v, batched_like(bias, q), is_causal, scale)
    tbias = batched_like(tbias, q)
    if tq is None and tk is None and tv is None and tbias is None:
        out, lse = differentiable(problem, bare)
        tangent = None
    else:
        out, tangent, lse = launch(problem, (tq, tk, tv, tbias), bare)
    split = (info.batch_size, -1)
    out, lse = out.unflatten(0, split), lse.unflatten(0, split)
    if tangent is None:
        return (out, out.new_empty(0), lse), (0, None, 0)
    return (out, tangent.unflatten(0, split), lse), (0, 0, 0)


class Attention(torch.autograd.Function):
    """`attention_forward`, naming the derivatives that have no formula.

    Without it a loss or a tangent would be left without its gradient.
    """

    vmap = staticmethod(batched)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *others: Any) -> tuple[Any, ...]:
        if others[0] is not None:
            raise NotImplementedError(
                "attention has no gradient through its tangent: detach the tangent, or take the JVP under no_grad."
            )
        return (None,) * 11 if grad_out is None else gradients(ctx, grad_out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_ONCE)


def join_batch(tensors: tuple[Any, ...], dims: tuple[Any, ...], size: int) -> list[Any]:
    """(V, B, ...) -> (V B, ...) for each tensor, repeated where it is not mapped; None stays None."""
    joined: list[Any] = []
    for x, dim in zip(tensors, dims[: len(tensors)], strict=True):
        if x is not None:
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
        joined.append(x)
    return joined


def batched_like(x: Tensor | None, q: Tensor) -> Tensor | None:
    """A bias (V or V B, ...) -> (V B, ...)."""
    if x is None or x.shape[0] == q.shape[0]:
        return x
    return x.repeat_interleave(q.shape[0] // x.shape[0], dim=0)


class Gradient(torch.autograd.Function):
    """(dO, q, k, v, bias, O, LSE, is_causal, scale, bias_grad, backend) -> (dQ, dK, dV, dBias), without derivatives."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"attention is differentiated in reverse once: {SECOND_ORDER}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        grad_out, q, k, v, bias, out, lse = join_batch(inputs[:7], in_dims, info.batch_size)
        full = batched_like(bias, q)
        dq, dk, dv, dbias = Gradient.apply(grad_out, q, k, v, full, out, lse, *inputs[7:])
        split = (info.batch_size, -1)
        grads = tuple(x.unflatten(0, split) for x in (dq, dk, dv))
        if bias is None or dbias.numel() == 0:
            return (*grads, dbias), (0, 0, 0, None)
        return (*grads, dbias.unflatten(0, (bias.shape[0], -1)).sum(1).unflatten(0, split)), (0, 0, 0, 0)


def innermost_is_vmap() -> bool:
    """Under jvp(vmap(f)) the tangents lie below the map: `Attention.vmap` looks for them there."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the question
        return False
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Vmap


def setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    save(ctx, inputs, output)


def compiled_gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    return gradients(ctx, grad_out)


attention_forward.register_autograd(compiled_gradients, setup_context=setup_compiled)
attention_forward.register_vmap(functools.partial(batched, bare=True))
