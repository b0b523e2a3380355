"""Which back end runs, what it needs, and what it refuses."""

import subprocess
import sys
import warnings

import pytest
import torch
from attention_reference import assert_close, inputs, oracle
from fewstep.kernels import attention, attention_jvp, backends, chunked, naive, use_backend

X = inputs(dtype=torch.float32)


def test_a_cpu_takes_the_chunked_back_end_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", X.q, X.v) is chunked
        attention_jvp(*X)


def test_without_forward_mode_torch_computes() -> None:
    q = X.q.clone().requires_grad_()
    with torch.profiler.profile() as profile:
        attention(q, X.k, X.v)
    names = {event.name for event in profile.events()}
    assert "aten::scaled_dot_product_attention" in names and not any("fewstep" in n for n in names)


@pytest.mark.parametrize("name, module", [("naive", naive), ("chunked", chunked)])
def test_a_chosen_back_end_runs_and_runs_the_backward(
    name: str, module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for direction in ("forward", "backward"):
        original = getattr(module, direction)
        monkeypatch.setattr(module, direction, lambda *a, d=direction, o=original: calls.append(d) or o(*a))
    q = X.q.clone().requires_grad_()
    with use_backend(name):
        out = attention(q, X.k, X.v)
    out.sum().backward()
    assert calls == ["forward", "backward"]


def test_choices_nest_and_end() -> None:
    with use_backend("chunked"):
        with use_backend("naive"):
            assert backends.requested() == "naive"
        assert backends.requested() == "chunked"
    with pytest.raises(ZeroDivisionError), use_backend("naive"):
        raise ZeroDivisionError
    assert backends.requested() == "auto"


def test_an_unknown_back_end_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="backend is 'flash'; pass one of triton, chunked, naive"),
        use_backend("flash"),
    ):
        pass


def test_triton_on_a_cpu_is_refused_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    with (
        pytest.raises(ValueError, match="'triton' cannot run: the tensors are on cpu"),
        use_backend("triton"),
    ):
        attention_jvp(*X)
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    with (
        pytest.raises(ValueError, match="'triton' cannot run: triton is not installed"),
        use_backend("triton"),
    ):
        attention_jvp(*X)


@pytest.mark.parametrize(
    "dtype, head_size, reason",
    [(torch.float64, 64, "no float64"), (torch.float16, 257, "257, above 256"), (torch.bfloat16, 256, None)],
)
def test_what_triton_cannot_do(
    dtype: torch.dtype, head_size: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    obstacle = backends.triton_obstacle("cuda", dtype, head_size)
    assert obstacle is None if reason is None else obstacle is not None and reason in obstacle


def test_rocm_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    obstacle = backends.triton_obstacle("cuda", torch.float16, 64)
    assert obstacle is not None and "ROCm" in obstacle


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda")
    dtype = torch.float64
    shape = (1, 1, 1, 64)


def test_a_fallback_on_a_cuda_device_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    backends.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="without the Triton kernel: it has no float64"):
        assert backends.select("auto", OnCuda(), OnCuda()) is chunked  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("auto", OnCuda(), OnCuda())  # type: ignore[arg-type]
    backends.warn_once.cache_clear()


def test_the_tangent_needs_no_square_matrix() -> None:
    """Largest tensor made for L = 3000 by the chunked back end, forward, tangent and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = [
                x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)
            ]
            largest = max([largest, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
            return result

    x = inputs(1, 1, 3000, 3000, 16, dtype=torch.float32)
    keys = torch.ones(3000, dtype=torch.bool)
    with Watch():
        out, _, lse = chunked.forward(*x, keys[None, None, None], None, False, 0.25)
        chunked.backward(out, *x.primals, keys[None, None, None], out, lse, False, 0.25, False)
    assert largest <= 2 * max(chunked.ELEMENTS["cpu"], chunked.MIN_ROWS * 3000)


def test_half_precision_is_accumulated_in_float32() -> None:
    x = inputs(1, 1, 20, 400, 32, dtype=torch.float16)
    x = x._replace(v=x.v + 8)
    for name, got, expected in zip(
        ("O", "tO"), chunked.forward(*x, None, None, False, 32**-0.5)[:2], oracle(x), strict=True
    ):
        assert_close(name, got, expected, 4e-4)


def test_importing_needs_neither_triton_nor_diffusers() -> None:
    program = """
import sys
sys.modules["triton"] = None
sys.modules["diffusers"] = None
import torch, fewstep.kernels as kernels
x = torch.randn(1, 1, 4, 8)
print(*(t.shape == x.shape for t in torch.func.jvp(kernels.attention, (x, x, x), (x, x, x))))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.stdout.split() == ["True", "True"], finished.stderr
