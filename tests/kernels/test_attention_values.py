"""O, tO, LSE and gradients against closed forms, torch's forward mode, differences and identities."""

import pytest
import torch
from attention_reference import Inputs, assert_close, explicit, gradients, inputs, oracle
from fewstep.kernels import attention, attention_jvp

F64 = torch.float64


def tiny() -> Inputs:
    rows = (
        [[1, 0], [0.5, -1]], [[1, 1], [0, 2], [-1, 0.5]], [[1, 2], [3, -1], [0, 0.5]],
        [[0.1, 0.2], [-0.3, 0.4]], [[0.5, 0], [0, -0.5], [0.25, 0.25]], [[0, 1], [1, 0], [-1, 2]],
    )  # fmt: skip
    return Inputs(*(torch.tensor(r, dtype=F64)[None, None] for r in rows))


def test_recorded_values(backend: str) -> None:
    out, tangent, lse = attention_jvp(*tiny())
    expected = (
        [[1.4279615744, 0.9379699032], [0.9952479516, 0.9787403591]],
        [[0.0954553380, 1.0355544937], [0.0478159863, 0.9462052771]],
        [1.2587972038, 0.3635132583],
    )
    for name, x, values in zip(("O", "tO", "LSE"), (out, tangent, lse), expected, strict=True):
        difference = (x[0, 0] - torch.tensor(values, dtype=F64)).abs().max()
        assert difference < 1e-10, f"{name} off by {difference:.1e}"


def test_recorded_duality(backend: str) -> None:
    x, grad_out = tiny(), torch.tensor([[1, -1], [0.5, 2]], dtype=F64)[None, None]
    primals = [p.requires_grad_() for p in x.primals]
    out, tangent, _ = attention_jvp(*primals, *x.tangents)
    grads = torch.autograd.grad(out, primals, grad_out)
    forward = float((grad_out * tangent.detach()).sum())
    reverse = sum(float((g * t).sum()) for g, t in zip(grads, x.tangents, strict=True))
    assert abs(forward - 0.9762193917) < 1e-10 and abs(reverse - 0.9762193917) < 1e-10


TOLERANCES = {
    F64: (1e-13, 1e-13),
    torch.float32: (2e-6, 2e-6),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (6e-3, 6e-3),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("lq, lk, d", [(63, 77, 32), (50, 50, 72)])
def test_against_the_float64_oracle(
    backend: str, dtype: torch.dtype, offset: float, lq: int, lk: int, d: int
) -> None:
    x = inputs(1, 2, lq, lk, d)
    x = x._replace(k=x.k + offset, v=x.v + offset).to(dtype)
    primals = [p.requires_grad_() for p in x.primals]
    out, tangent, lse = attention_jvp(*primals, *x.tangents)
    expected, expected_tangent = oracle(Inputs(*(t.detach() for t in x)))
    assert_close("O", out, expected, TOLERANCES[dtype][0])
    assert_close("tO", tangent, expected_tangent, TOLERANCES[dtype][1])
    scores = x.q.double() @ x.k.double().mT * d**-0.5
    assert_close(
        "LSE", lse, scores.logsumexp(-1), max(1e-6, TOLERANCES[dtype][0] / 100) if dtype != F64 else 1e-13
    )
    assert (out.dtype, tangent.dtype) == (dtype, dtype)
    assert lse.dtype == (F64 if dtype == F64 else torch.float32)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, primals, grad_out)
    tolerance = TOLERANCES[dtype][0] * (1 if offset == 0 else 20)
    for name, grad, reference in zip(("dQ", "dK", "dV"), grads, gradients(x, grad_out), strict=True):
        # With dK the sum over queries of P (dP - mean) cancels, as O, which is rounded to dtype, enters it.
        assert_close(name, grad, reference, 4 * tolerance)


def jvp(x: Inputs, **changed: torch.Tensor | None) -> torch.Tensor:
    """tO with some arguments replaced."""
    y = x._replace(**changed)  # type: ignore[arg-type]
    return attention_jvp(*y.primals, *y.tangents)[1]


def test_identities(backend: str) -> None:
    x = inputs()
    row = torch.randn(x.k.shape[-1], dtype=F64)
    assert_close("tq = tk = 0", jvp(x, tq=None, tk=None), explicit(x.q, x.k, x.tv), 1e-13)
    assert_close("one row added to all of tk", jvp(x, tk=x.tk + row), jvp(x), 1e-12)
    scaled_q, scaled_k = jvp(x, tq=x.q, tk=None, tv=None), jvp(x, tq=None, tk=x.k, tv=None)
    assert_close("tq = q against tk = k", scaled_q, scaled_k, 1e-12)
    assert scaled_q.norm() > 0.1
    constant = x.v[:, :, :1].expand_as(x.v)
    assert jvp(x, v=constant, tv=None).abs().max() < 1e-13
    one = inputs(lk=1)
    assert_close("one key", jvp(one), one.tv.expand(-1, -1, 7, -1), 1e-13)
    other = inputs(seed=1)
    both = Inputs(*x.primals, *(2 * a - 3 * b for a, b in zip(x.tangents, other.tangents, strict=True)))
    second = Inputs(*x.primals, *other.tangents)
    assert_close("linear", jvp(both), 2 * jvp(x) - 3 * jvp(second), 1e-12)
    order = torch.randperm(9)
    shuffled = {n: getattr(x, n)[:, :, order] for n in ("k", "v", "tk", "tv")}
    assert_close("keys in another order", jvp(x, **shuffled), jvp(x), 1e-13)


@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_and_reverse_are_adjoint(backend: str, is_causal: bool) -> None:
    x = inputs(lq=11, lk=13, d=16, dv=24)
    primals = [p.requires_grad_() for p in x.primals]
    out, tangent, _ = attention_jvp(*primals, *x.tangents, is_causal=is_causal)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, primals, grad_out)
    reverse = sum((g * t).sum() for g, t in zip(grads, x.tangents, strict=True))
    assert torch.isclose((grad_out * tangent).sum(), reverse, rtol=1e-12)


@pytest.mark.parametrize("logit_scale, tolerance", [(1.0, 1e-8), (100.0, 1e-7)])
def test_central_differences(backend: str, logit_scale: float, tolerance: float) -> None:
    x = inputs()
    x = x._replace(q=x.q * logit_scale, tq=x.tq * logit_scale)
    h = 1e-6 if logit_scale == 1 else 1e-8
    ahead, behind = (
        attention(*(p + s * h * t for p, t in zip(x.primals, x.tangents, strict=True))) for s in (1, -1)
    )
    assert_close("tO", jvp(x), (ahead - behind) / (2 * h), tolerance * (1 if logit_scale == 1 else 10))


def test_gradcheck_in_both_modes(backend: str) -> None:
    x = inputs(1, 2, 3, 4, 8)
    bias = torch.randn(2, 1, 4, dtype=F64)
    arguments = [t.clone().requires_grad_() for t in (*x.primals, bias)]
    assert torch.autograd.gradcheck(attention, arguments, check_forward_ad=True, check_backward_ad=True)


def test_extreme_logits(backend: str) -> None:
    x = inputs(d=16, dtype=torch.float32)
    hot = x._replace(q=100 * x.q)
    out, tangent, _ = attention_jvp(*hot)
    expected, expected_tangent = oracle(hot)
    assert_close("O", out, expected, 5e-5)
    assert_close("tO", tangent, expected_tangent, 5e-5)
    flat = x._replace(q=torch.zeros_like(x.q))
    assert_close("uniform", attention_jvp(*flat)[0], x.v.mean(2, keepdim=True).expand_as(x.q), 2e-6)
    assert_close("tO of uniform", attention_jvp(*flat)[1], oracle(flat)[1], 2e-6)


def test_common_offset_of_the_keys_costs_no_accuracy(backend: str) -> None:
    x = inputs(1, 2, 33, 256, 64)
    x = x._replace(k=x.k + 40 * torch.ones(64, dtype=F64), tq=x.tq + 1, v=x.v + 40).to(torch.float32)
    assert_close("tO", attention_jvp(*x)[1], oracle(x)[1], 4e-5)
