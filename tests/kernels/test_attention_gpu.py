"""On a CUDA device: the Triton kernels against the float64 oracle, and ATen's backward behind them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from attention_reference import Inputs, assert_close, gradients, inputs, oracle
from fewstep.kernels import ForwardModeAttention, attention, attention_jvp, use_backend
from fewstep.kernels.backends import triton_obstacle
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def check(x: Inputs, mask: torch.Tensor | None = None, is_causal: bool = False) -> None:
    allowed = TOLERANCES[x.q.dtype]
    primals = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in x.primals]
    with use_backend("triton"):
        out, tangent, _ = attention_jvp(*primals, *x.tangents, mask, is_causal=is_causal)
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, primals, grad_out)
    for name, got, expected in zip(("O", "tO"), (out, tangent), oracle(x, mask, is_causal), strict=True):
        assert_close(name, got, expected, allowed)
    for name, got, expected in zip(
        ("dQ", "dK", "dV"), grads, gradients(x, grad_out, mask, is_causal), strict=True
    ):
        assert_close(name, got, expected, 3 * allowed)


TILED = [(dtype, d) for dtype in TOLERANCES for d in (8, 40, 64, 72, 80, 128, 160, 256)
         if triton_obstacle("cuda", dtype, d) is None]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lq, lk", [(128, 128), (500, 63), (77, 999), (1, 515)])
@pytest.mark.parametrize("dtype, d", TILED, ids=str)
def test_against_the_float64_oracle(dtype: torch.dtype, lq: int, lk: int, d: int, seed: int) -> None:
    check(inputs(2, 3, lq, lk, d, dtype=dtype, device="cuda", seed=seed))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lq, lk", [(500, 500), (300, 515), (515, 300)])
def test_causal(dtype: torch.dtype, lq: int, lk: int) -> None:
    check(inputs(1, 2, lq, lk, 64, dtype=dtype, device="cuda"), is_causal=True)


@pytest.mark.parametrize("kind", ["boolean", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_masks(dtype: torch.dtype, kind: str) -> None:
    mask = torch.randn(2, 1, 150, 77, device="cuda", dtype=dtype)
    if kind == "boolean":
        mask = mask > 0
        mask[:, :, 5] = False
    check(inputs(2, 3, 150, 77, 64, dtype=dtype, device="cuda"), mask)


@pytest.mark.parametrize("dv", [24, 128])
def test_another_value_size_and_layout(dv: int) -> None:
    x = inputs(2, 3, 100, 130, 64, dv, dtype=torch.float16, device="cuda")
    check(Inputs(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offsets_of_keys_and_values(dtype: torch.dtype) -> None:
    x = inputs(1, 2, 1024, 1024, 64)
    x = Inputs(*(t.cuda() for t in x._replace(k=x.k + 4, v=x.v + 4).to(dtype)))
    with use_backend("triton"):
        assert_close("tO", attention_jvp(*x)[1], oracle(x)[1], 1e-2)


def test_offsets_beyond_two_to_the_31() -> None:
    check(inputs(1, 1, 3, 3, 64, dtype=torch.float16, device="cuda"))
    x = inputs(1, 1, 3, 3, 64, dtype=torch.float16, device="cuda")
    rooms = [torch.empty(2**31 + 64, dtype=torch.float16, device="cuda") for _ in range(2)]
    q, tq = (
        room.as_strided(t.shape, (0, 0, 2**30, 1)).copy_(t)
        for room, t in zip(rooms, (x.q, x.tq), strict=True)
    )
    with use_backend("triton"):
        assert_close("tO", attention_jvp(q, x.k, x.v, tq, x.tk, x.tv)[1], oracle(x)[1], 1e-3)


def test_the_function_mode_and_compile_without_a_warning() -> None:
    x = inputs(2, 3, 100, 130, 64, dtype=torch.float16, device="cuda")
    compiled = torch.compile(lambda p, t: torch.func.jvp(attention, p, t), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with ForwardModeAttention():
            tangent = torch.func.jvp(F.scaled_dot_product_attention, x.primals, x.tangents)[1]
        assert_close("tO", tangent, oracle(x)[1], 1e-3)
        assert_close("tO compiled", compiled(x.primals, x.tangents)[1], oracle(x)[1], 1e-3)


def test_float64_runs_chunked_with_one_warning() -> None:
    from fewstep.kernels import backends

    x = inputs(device="cuda")
    backends.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="without the Triton kernel: it has no float64"):
        assert_close("tO", attention_jvp(*x)[1], oracle(x)[1], 1e-13)


def test_torchs_math_agrees() -> None:
    x = inputs(1, 2, 200, 200, 64, dtype=torch.float32, device="cuda")
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(F.scaled_dot_product_attention, x.primals, x.tangents)[1]
    assert_close("tO", torch.func.jvp(attention, x.primals, x.tangents)[1], expected, 1e-5)
