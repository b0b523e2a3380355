"""`attention` takes what scaled_dot_product_attention takes, and means the same by it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_reference import Inputs, assert_close, explicit, inputs, oracle
from fewstep.kernels import attention, attention_jvp, chunked
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    boolean = torch.rand(2, 2, 7, 9, generator=generator) > 0.4
    boolean[:, :, 2] = False
    infinite = torch.zeros(7, 9, dtype=F64)
    infinite[1:3] = -torch.inf
    infinite[3, 4:] = -torch.inf
    return {
        "boolean": boolean, "one row": boolean[0, 0, :1], "keys of a batch": boolean[:, :1, :1],
        "heads": boolean[:1], "bias": torch.randn(2, 2, 7, 9, dtype=F64, generator=generator),
        "bias of a row": torch.randn(1, 9, dtype=F64, generator=generator),
        "bias of a head": torch.randn(2, 1, 9, dtype=F64, generator=generator), "infinite": infinite,
        "column": torch.randn(7, 1, dtype=F64, generator=generator),
    }  # fmt: skip


@pytest.mark.parametrize("name", masks())
def test_masks(backend: str, name: str) -> None:
    x, mask = inputs(), masks()[name]
    out, tangent, lse = attention_jvp(*x, mask)
    stock = F.scaled_dot_product_attention(*x.primals, mask)
    expected, expected_tangent = oracle(x, mask)
    assert_close("O against torch", out, stock, 1e-13)
    assert_close("O", out, expected, 1e-13)
    assert_close("tO", tangent, expected_tangent, 1e-13)
    primals = [p.requires_grad_() for p in x.primals]
    grad_out = torch.randn_like(out)
    with sdpa_kernel(SDPBackend.MATH):
        reference = torch.autograd.grad(F.scaled_dot_product_attention(*primals, mask), primals, grad_out)
    for label, grad, expected in zip(
        ("dQ", "dK", "dV"),
        torch.autograd.grad(attention(*primals, mask), primals, grad_out),
        reference,
        strict=True,
    ):
        assert_close(label, grad, expected, 1e-12)
    dead = (stock == 0).all(-1)
    assert (lse[dead] == -torch.inf).all() and lse[~dead].isfinite().all()
    if name in ("boolean", "infinite", "heads"):
        assert dead.any() and (out[dead] == 0).all() and (tangent[dead] == 0).all()


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_a_huge_finite_bias_on_whole_rows(backend: str, value: float) -> None:
    """O is the mean of V, as torch has it, and P sums to one in the backward too."""
    x = inputs(dtype=torch.float32)
    x = x._replace(q=x.q / 10**4, tq=x.tq / 10**4)
    bias = torch.zeros(7, 9)
    bias[2:4] = value
    primals = [p.requires_grad_() for p in x.primals]
    out, tangent, lse = attention_jvp(*primals, *x.tangents, bias)
    with sdpa_kernel(SDPBackend.MATH):
        stock = F.scaled_dot_product_attention(*primals, bias)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(stock, primals, grad_out)
    grads = torch.autograd.grad(out, primals, grad_out)
    assert_close("O", out.detach(), stock.detach(), 1e-3)
    assert lse.isfinite().all() and tangent.isfinite().all()
    for name, grad, reference in zip(("dQ", "dK", "dV"), grads, expected, strict=True):
        assert_close(name, grad, reference, 1e-3)


def test_hidden_pairs_hide_bad_keys(backend: str) -> None:
    x = inputs()
    mask = torch.ones(9, dtype=torch.bool)
    mask[5:] = False
    for t in (x.k, x.tk):
        t[:, :, 5:] = torch.nan
    seen = Inputs(x.q, x.k[:, :, :5], x.v[:, :, :5], x.tq, x.tk[:, :, :5], x.tv[:, :, :5])
    for a, b in zip(attention_jvp(*x, mask[None]), attention_jvp(*seen), strict=True):
        assert_close("as if the keys were cut off", a, b, 1e-13)


@pytest.mark.parametrize("lq, lk", [(7, 7), (5, 9), (9, 5)])
def test_causal_counts_from_the_top_left(backend: str, lq: int, lk: int) -> None:
    x = inputs(lq=lq, lk=lk)
    out, tangent, _ = attention_jvp(*x, is_causal=True)
    assert_close("O", out, F.scaled_dot_product_attention(*x.primals, is_causal=True), 1e-13)
    assert_close("tO", tangent, oracle(x, is_causal=True)[1], 1e-13)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_no_scale_is_too_odd(backend: str, scale: float, is_causal: bool) -> None:
    """Without a tangent, with one, and backward: a hidden score is hidden whatever it is multiplied by."""
    x = inputs(lq=9)
    expected, change = oracle(x, is_causal=is_causal, scale=scale)
    primals = [p.clone().requires_grad_() for p in x.primals]
    out = attention(*primals, is_causal=is_causal, scale=scale)
    assert_close("O", out, expected, 1e-13)
    assert_close("tO", attention_jvp(*x, is_causal=is_causal, scale=scale)[1], change, 1e-12)
    grad_out = torch.ones_like(out).cumsum(-1)
    grads = torch.autograd.grad(out, primals, grad_out)
    plain = [p.detach().clone().requires_grad_() for p in primals]
    wanted = torch.autograd.grad(explicit(*plain, is_causal=is_causal, scale=scale), plain, grad_out)
    for got, want in zip(grads, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


def test_scale(backend: str) -> None:
    x = inputs()
    out, tangent, _ = attention_jvp(*x, scale=0.7)
    assert_close("O", out, F.scaled_dot_product_attention(*x.primals, scale=0.7), 1e-13)
    assert_close("tO", tangent, oracle(x, scale=0.7)[1], 1e-13)


def test_grouped_queries(backend: str) -> None:
    q, few = inputs(heads=6), inputs(heads=2, seed=1)
    x = (q.q, few.k, few.v)
    tangents = (q.tq, few.tk, few.tv)
    full = Inputs(
        q.q,
        *(t.repeat_interleave(3, 1) for t in x[1:]),
        q.tq,
        *(t.repeat_interleave(3, 1) for t in tangents[1:]),
    )
    explicit_jvp = attention_jvp(*x, *tangents, enable_gqa=True)[:2]
    dual = torch.func.jvp(lambda *p: attention(*p, enable_gqa=True), x, tangents)
    for out, tangent in (explicit_jvp, dual):
        assert_close("O", out, F.scaled_dot_product_attention(*x, enable_gqa=True), 1e-13)
        assert_close("tO", tangent, oracle(full)[1], 1e-13)


@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 80, 128, 160, 256])
def test_head_sizes(backend: str, d: int) -> None:
    x = inputs(1, 1, 5, 6, d)
    assert_close("tO", attention_jvp(*x)[1], oracle(x)[1], 1e-13)


@pytest.mark.parametrize(
    "lq, lk, d, dv", [(1, 9, 8, 8), (7, 1, 8, 8), (77, 15, 8, 24), (13, 99, 16, 8), (1, 1, 8, 8)]
)
def test_ragged_and_cross_lengths(backend: str, lq: int, lk: int, d: int, dv: int) -> None:
    x = inputs(1, 3, lq, lk, d, dv)
    out, tangent, _ = attention_jvp(*x)
    expected, expected_tangent = oracle(x)
    assert_close("O", out, expected, 1e-13)
    assert (tangent - expected_tangent).norm() <= 1e-13 * max(1, expected_tangent.norm())


def strided(x: Tensor) -> Tensor:
    """The values of x (B, H, L, D) laid out as every other row and feature of a (B, L, H, D) tensor."""
    room = torch.full((x.shape[0], 2 * x.shape[2], x.shape[1], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    view = room[:, ::2, :, ::2].transpose(1, 2)
    return view.copy_(x)


@pytest.mark.parametrize("layout", [strided, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_strided_layouts(backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = inputs(dtype=dtype)
    views = Inputs(*(layout(t) for t in x))
    mixed = Inputs(*views.primals, *x.tangents)
    for y in (views, mixed):
        assert_close("tO", attention_jvp(*y)[1], oracle(x)[1], 1e-13 if dtype == F64 else 2e-6)
    primals = [p.requires_grad_() for p in views.primals]
    plain = [p.clone().requires_grad_() for p in x.primals]
    grads = torch.autograd.grad(attention(*primals).square().sum(), primals)
    for a, b in zip(grads, torch.autograd.grad(attention(*plain).square().sum(), plain), strict=True):
        assert_close("gradient", a, b, 1e-13 if dtype == F64 else 2e-6)


def test_expanded_tangents_and_broadcast_batches(backend: str) -> None:
    x = inputs()
    wide = x._replace(tq=x.tq[:, :, :1].expand_as(x.q), tk=x.tk[:1].expand_as(x.k))
    assert_close("expanded tangents", attention_jvp(*wide)[1], oracle(wide)[1], 1e-13)
    shared = x._replace(k=x.k[:1, :1], tk=x.tk[:1, :1])
    assert_close("one k for all", attention_jvp(*shared)[1], oracle(shared)[1], 1e-13)


@pytest.mark.parametrize("ndim", [2, 3])
def test_fewer_dimensions(backend: str, ndim: int) -> None:
    x = Inputs(*(t[(0,) * (4 - ndim)] for t in inputs()))
    out, tangent, lse = attention_jvp(*x)
    expected, expected_tangent = oracle(x)
    assert out.shape == expected.shape and lse.shape == expected.shape[:-1]
    assert_close("O", out, expected, 1e-13)
    assert_close("tO", tangent, expected_tangent, 1e-13)
    assert_close("dual", torch.func.jvp(attention, x.primals, x.tangents)[1], expected_tangent, 1e-13)


MISSING = [{n for i, n in enumerate(("tq", "tk", "tv")) if bits >> i & 1} for bits in range(1, 8)]


@pytest.mark.parametrize("missing", MISSING, ids=lambda m: "+".join(sorted(m)))
def test_missing_tangents_are_zeros(backend: str, missing: set[str]) -> None:
    x = inputs()
    zeros = x._replace(**{n: torch.zeros_like(getattr(x, n)) for n in missing})
    none = x._replace(**dict.fromkeys(missing))
    reference, tangent = oracle(zeros)[1], attention_jvp(*none)[1]
    assert (tangent - reference).norm() <= 1e-13 * max(1, reference.norm())


class Products(TorchDispatchMode):
    """Counts multiply-adds of batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "present, products", [("tq tk tv", 6), ("tq", 4), ("tk", 4), ("tv", 3), ("tq tk", 5), ("tq tv", 5)]
)
def test_missing_tangents_save_products(present: str, products: int) -> None:
    x = inputs()
    tangents = [getattr(x, n) if n in present.split() else None for n in ("tq", "tk", "tv")]
    with Products() as counter:
        chunked.forward(*x.primals, *tangents, None, None, False, 1.0)
    assert counter.count == products * 2 * 2 * 7 * 9 * 8


@pytest.mark.parametrize("shape", ["bias", "bias of a row", "bias of a head"])
def test_tangent_of_a_bias(backend: str, shape: str) -> None:
    x, bias = inputs(), masks()[shape]
    change = torch.randn_like(bias)

    def biased(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, (*x.primals, bias), (*x.tangents, change))

    with sdpa_kernel(SDPBackend.MATH):
        expected = biased(F.scaled_dot_product_attention)
    for got in (biased(attention), attention_jvp(*x, bias, t_attn_mask=change)[:2]):
        assert_close("tO", got[1], expected[1], 1e-12)
    alone = attention_jvp(*x.primals, None, None, None, bias, t_attn_mask=change)[1]
    zero = x._replace(tq=torch.zeros_like(x.q), tk=torch.zeros_like(x.k), tv=torch.zeros_like(x.v))
    with sdpa_kernel(SDPBackend.MATH):
        only_bias = torch.func.jvp(
            lambda b: F.scaled_dot_product_attention(*zero.primals, b), (bias,), (change,)
        )
    assert_close("tO of the bias alone", alone, only_bias[1], 1e-12)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"lq": 0}, {"lk": 0}])
def test_empty_inputs(backend: str, sizes: dict[str, int]) -> None:
    x = inputs(**sizes)
    out, tangent, lse = attention_jvp(*x)
    assert out.shape == tangent.shape == x.q.shape and lse.shape == x.q.shape[:-1]
    assert (out == 0).all() and (tangent == 0).all() and (lse == -torch.inf).all()


CALLS = {
    "dropout_p is 0.1": lambda x: attention(*x.primals, dropout_p=0.1),
    "q has dtype torch.int64": lambda x: attention(*(t.long() for t in x.primals)),
    "k has dtype torch.float32 and q torch.float64": lambda x: attention(x.q, x.k.float(), x.v),
    "k has head size 4 and q 8": lambda x: attention(x.q, x.k[..., :4], x.v),
    "v has 8 positions and k 9": lambda x: attention(x.q, x.k, x.v[:, :, :8]),
    "q has 5 dimensions": lambda x: attention_jvp(*(t[None] for t in x)),
    "is_causal is True beside attn_mask": lambda x: attention(
        *x.primals, torch.ones(7, 9).bool(), is_causal=True
    ),
    "attn_mask has dtype torch.int64": lambda x: attention(*x.primals, torch.ones(7, 9).long()),
    r"attn_mask has shape \(7, 8\)": lambda x: attention_jvp(*x, torch.ones(7, 8)),
    "do not broadcast": lambda x: attention_jvp(
        *x.primals[:2], torch.ones(2, 3, 9, 8).double(), None, None, None
    ),
    "k has 2 heads, no divisor of q's 3": lambda x: attention(
        torch.ones(2, 3, 7, 8).double(), x.k, x.v, enable_gqa=True
    ),
    "tq is": lambda x: attention_jvp(*x.primals, x.tq.float(), None, None),
    "tv is": lambda x: attention_jvp(*x.primals, None, None, x.tk[:, :1]),
    "t_attn_mask is given without": lambda x: attention_jvp(*x, t_attn_mask=torch.ones(7, 9).double()),
}


def test_without_forward_mode_five_dimensions_are_torchs_matter() -> None:
    five = [t[None] for t in inputs().primals]
    assert torch.equal(attention(*five), F.scaled_dot_product_attention(*five))


def test_grouped_queries_outside_forward_mode_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = []
    original = torch.Tensor.repeat_interleave
    monkeypatch.setattr(
        torch.Tensor, "repeat_interleave", lambda *a, **k: repeats.append(a) or original(*a, **k)
    )
    q, few = inputs(heads=6), inputs(heads=2, seed=1)
    out = attention(q.q, few.k, few.v, enable_gqa=True)
    assert not repeats
    assert torch.equal(out, F.scaled_dot_product_attention(q.q, few.k, few.v, enable_gqa=True))
    attention_jvp(q.q, few.k, few.v, None, None, None, enable_gqa=True)
    assert len(repeats) == 2


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    """Casts what torch's operator casts: all dtypes but float64, a floating mask too; tangents follow."""
    x = inputs(dtype=torch.float32)
    bias = torch.randn(7, 9)
    mixed = (x.q, x.k, x.v.to(dtype), bias)
    lower = Inputs(*cast(dtype, *x))
    with torch.autocast("cpu", dtype):
        stock = F.scaled_dot_product_attention(*mixed)
        eager = attention(*mixed)
        out, tangent = torch.func.jvp(lambda q, k: attention(q, k, *mixed[2:]), (x.q, x.k), (x.tq, x.tk))
        exact = attention(*inputs().primals)
    still = lower._replace(tv=torch.zeros_like(lower.tv))
    expected, expected_tangent = oracle(still, bias.to(dtype))
    assert {stock.dtype, eager.dtype, out.dtype, tangent.dtype} == {dtype} and exact.dtype == F64
    for name, got in (("O", eager), ("O of jvp", out)):
        assert_close(name, got, expected, 6e-3)
    assert_close("tO", tangent, expected_tangent, 6e-3)


def test_autocast_without_a_choice_of_back_end() -> None:
    x = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(x.q, x.k, x.v.bfloat16())
        tangent = torch.func.jvp(attention, x.primals, x.tangents)[1]
        compiled = torch.compile(
            lambda *p: torch.func.jvp(attention, p, x.tangents)[1], fullgraph=True, backend="aot_eager"
        )(*x.primals)
    assert mixed.dtype == tangent.dtype == compiled.dtype == torch.bfloat16
    expected = oracle(x.to(torch.bfloat16))[1]
    assert_close("tO", tangent, expected, 6e-3)
    assert_close("tO compiled", compiled, expected, 6e-3)


@pytest.mark.parametrize("message", CALLS)
def test_refusals_name_the_argument(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CALLS[message](inputs())
