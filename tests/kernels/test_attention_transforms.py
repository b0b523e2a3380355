"""`attention` under torch.func, dual numbers, checkpointing and torch.compile; what is refused is refused loudly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_reference import assert_close, explicit, inputs
from fewstep.kernels import attention, attention_jvp, use_backend
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Tensor]
X = inputs()
Y = inputs(seed=1)
STACKED = [torch.stack(pair) for pair in zip(X, Y, strict=True)]


def query_jvp(f: Function) -> Tensor:
    return jvp(lambda q: f(q, X.k, X.v), (X.q,), (X.tq,))[1]


def value_jvp(f: Function) -> Tensor:
    return jvp(lambda v: f(X.q, X.k, v), (X.v,), (X.tv,))[1]


def shared_input(f: Function) -> Tensor:
    return jvp(lambda x: f(x, x, x), (X.k,), (X.tk,))[1]


def gradient_beside_a_jvp(f: Function) -> Tensor:
    return grad(lambda q: jvp(f, (q, X.k, X.v), X.tangents)[0].square().sum())(X.q)


def batch_of_jvps(f: Function) -> Tensor:
    return vmap(lambda *x: jvp(f, x[:3], x[3:])[1])(*STACKED)


def jvp_of_a_batch(f: Function) -> Tensor:
    return jvp(vmap(f), tuple(STACKED[:3]), tuple(STACKED[3:]))[1]


def batch_over_another_dimension(f: Function) -> Tensor:
    moved = STACKED[0].movedim(0, 2)
    return vmap(lambda q: jvp(lambda v: f(q, X.k, v), (X.v,), (X.tv,))[1], in_dims=2)(moved)


def jacobian(f: Function) -> Tensor:
    return jacfwd(lambda q: f(q, X.k, X.v))(X.q)


def batch_of_gradients(f: Function) -> Tensor:
    return vmap(grad(lambda q: f(q, X.k, X.v).square().sum()))(STACKED[0])


def batch_of_cotangents(f: Function) -> Tensor:
    return vmap(vjp(f, *X.primals)[1])(torch.stack([X.tq, Y.tq]))[1]


def batch_of_cotangents_of_one_item(f: Function) -> Tensor:
    one = [p[:1] for p in X.primals]
    return torch.cat(vmap(vjp(f, *one)[1])(torch.stack([X.tq[:1], Y.tq[:1]])), 3)


TRANSFORMS = [
    query_jvp, value_jvp, shared_input, gradient_beside_a_jvp, batch_of_jvps, jvp_of_a_batch,
    batch_over_another_dimension, jacobian, batch_of_gradients, batch_of_cotangents,
    batch_of_cotangents_of_one_item,
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
def test_transforms(backend: str, transform: Callable[[Function], Tensor]) -> None:
    result, expected = transform(attention), transform(explicit)
    assert expected.norm() > 0.1
    assert_close(transform.__name__, result, expected, 1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
def test_transforms_without_a_choice_of_back_end(transform: Callable[[Function], Tensor]) -> None:
    assert_close(transform.__name__, transform(attention), transform(explicit), 1e-12)


def test_batches_of_masks(backend: str) -> None:
    bias, change = (torch.randn(3, 2, 1, 9, dtype=torch.float64) for _ in range(2))

    def biased(f: Function, *, of: str) -> Tensor:
        if of == "jvp of the bias":
            return vmap(lambda b, t: jvp(lambda c: f(*X.primals, c), (b,), (t,))[1])(bias, change)
        if of == "gradient of the bias":
            return vmap(grad(lambda b: f(*X.primals, b).square().sum()))(bias)
        return vmap(lambda b: jvp(lambda q: f(q, X.k, X.v, b > 0), (X.q,), (X.tq,))[1])(bias)

    for of in ("jvp of the bias", "gradient of the bias", "boolean"):
        assert_close(of, biased(attention, of=of), biased(explicit, of=of), 1e-12)


@pytest.mark.parametrize("without_grad", [False, True])
def test_dual_numbers(backend: str, without_grad: bool) -> None:
    primals = [p.clone().requires_grad_(not without_grad) for p in X.primals]
    with forward_ad.dual_level(), torch.set_grad_enabled(not without_grad):
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, X.tangents, strict=True)]
        out, tangent = forward_ad.unpack_dual(attention(*duals))
        assert tangent is not None
    expected, expected_tangent = jvp(explicit, X.primals, X.tangents)
    assert_close("O", out, expected, 1e-13)
    assert_close("tO", tangent, expected_tangent, 1e-13)
    if not without_grad:
        grads = torch.autograd.grad(out, primals, X.tq)
        for a, b in zip(grads, vjp(explicit, *X.primals)[1](X.tq), strict=True):
            assert_close("gradient", a, b, 1e-12)


def test_a_call_without_tangents_inside_a_jvp_has_none(backend: str) -> None:
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(attention(*X.primals)).tangent is None


def test_one_launch_computes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.kernels import naive

    launches = []
    original = naive.forward
    monkeypatch.setattr(naive, "forward", lambda *a: launches.append(a) or original(*a))
    with use_backend("naive"):
        jvp(attention, X.primals, X.tangents)
    assert len(launches) == 1


def test_checkpoint_around_a_block_with_a_jvp(backend: str) -> None:
    def block(f: Function, q: Tensor) -> Tensor:
        out, tangent = jvp(f, (q, X.k, X.v), X.tangents)
        return out + tangent.detach()

    def gradient(f: Function, wrapped: bool) -> Tensor:
        q = X.q.clone().requires_grad_()
        out: Any = checkpoint(block, f, q, use_reentrant=False) if wrapped else block(f, q)
        return torch.autograd.grad(out, q, X.tq)[0]

    assert_close("gradient", gradient(attention, True), gradient(explicit, False), 1e-12)


def test_checkpoint_inside_a_jvp_without_grad(backend: str) -> None:
    """As far as torch's checkpoint has a forward mode: 2.11's has none for any function."""

    def inside(f: Function) -> Tensor:
        with torch.no_grad():
            return query_jvp(lambda *a: checkpoint(f, *a, use_reentrant=False))

    try:
        expected = inside(explicit)
    except NotImplementedError:
        assert torch.__version__ < "2.14"
        with pytest.raises(NotImplementedError, match="must implement the jvp function"):
            inside(attention)
    else:
        assert_close("tO", inside(attention), expected, 1e-12)


REFUSED = {
    "jvp of jvp": lambda: jvp(lambda x: jvp(lambda y: attention(y, y, y), (x,), (X.tq,))[1], (X.q,), (X.tq,)),
    "jvp of grad": lambda: jvp(grad(lambda x: attention(x, x, x).sum()), (X.q,), (X.tq,)),
    "gradient through the tangent": lambda: grad(lambda q: jvp(attention, (q, X.k, X.v), X.tangents)[1].sum())(X.q),
    "attention_jvp of tangents": lambda: jvp(lambda t: attention_jvp(*X.primals, t, None, None)[1], (X.tq,), (X.tq,)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_second_derivatives_are_refused(backend: str, case: str) -> None:
    with pytest.raises(
        NotImplementedError, match=r"attention (is differentiated forward once|has no gradient)"
    ):
        REFUSED[case]()


def test_second_reverse_derivative_is_refused(backend: str) -> None:
    q = X.q.clone().requires_grad_()
    first = torch.autograd.grad(attention(q, X.k, X.v).square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="in reverse once"):
        first.sum().backward()


def test_two_levels_of_which_one_reaches_attention(backend: str) -> None:
    """Nested jvp is refused only where its second tangent passes through."""
    nested = jvp(
        lambda s: s * query_jvp(attention),
        (torch.ones((), dtype=torch.float64),),
        (torch.ones((), dtype=torch.float64),),
    )
    assert_close("inner tangent", nested[1], query_jvp(explicit), 1e-12)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


COMPILED = [query_jvp, value_jvp, shared_input, batch_of_jvps, batch_over_another_dimension, jacobian]


@pytest.mark.parametrize("transform", COMPILED, ids=lambda t: t.__name__)
def test_compiled_forward_mode(transform: Callable[[Function], Tensor]) -> None:
    assert_close("tO", compiled(lambda: transform(attention))(), transform(explicit), 1e-12)


@pytest.mark.parametrize("name", ["chunked", "auto"])
def test_compiled_gradients(name: str) -> None:
    def primal(q: Tensor) -> Tensor:
        return attention(q, X.k, X.v)

    def beside_a_tangent(q: Tensor) -> Tensor:
        return attention_jvp(q, X.k, X.v, *X.tangents)[0]

    def of_a_jvp(q: Tensor) -> Tensor:
        return jvp(attention, (q, X.k, X.v), X.tangents)[0]

    expected = grad(lambda q: explicit(q, X.k, X.v).square().sum())(X.q)
    for function in (primal, beside_a_tangent, of_a_jvp):
        q = X.q.clone().requires_grad_()
        if name == "auto":
            out = compiled(function)(q)
        else:
            with use_backend(name):
                out = compiled(function)(q)
        out.square().sum().backward()
        assert_close(function.__name__, q.grad, expected, 1e-12)


TORCHS_WORDS = "autograd.Function with functorch transforms"


@pytest.mark.parametrize(
    "case, message",
    [
        ("jvp of jvp", "differentiated forward once"),
        ("jvp of grad", TORCHS_WORDS),
        ("gradient through the tangent", TORCHS_WORDS),
        ("attention_jvp of tangents", "differentiated forward once"),
    ],
)
def test_compiled_second_derivatives_are_refused(case: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        compiled(REFUSED[case])()


def test_the_operators_describe_themselves_rightly() -> None:
    from fewstep.kernels.ops import attention_backward, attention_forward

    bias = torch.randn(2, 1, 9, dtype=torch.float64)[None]
    tests = ("test_schema", "test_faketensor")
    forward = (*X, bias, None, False, 0.5, "chunked")
    torch.library.opcheck(attention_forward, forward, test_utils=tests)
    torch.library.opcheck(attention_forward, (*X.primals, *[None] * 5, True, 0.5, "auto"), test_utils=tests)
    out, _, lse = attention_forward(*forward)
    for bias_grad, mask in ((True, bias), (False, None)):
        arguments = (X.tq, *X.primals, mask, out, lse, False, 0.5, bias_grad, "chunked")
        torch.library.opcheck(attention_backward, arguments, test_utils=tests)
