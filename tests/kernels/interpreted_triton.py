"""The Triton kernels in Triton's interpreter: test_attention_triton.py runs this file in processes of its own.

The interpreter cuts bfloat16 off instead of rounding it, and computes products in full precision; an access out of
bounds ends the process.
"""

from typing import Any

import pytest
import torch
from attention_reference import Inputs, assert_close, explicit, gradients, inputs, oracle
from fewstep.kernels import attention, attention_jvp, attention_triton_backward, backends, use_backend
from fewstep.kernels import attention_triton as forward_module
from fewstep.kernels.triton_tiles import Blocks, Tiles, aligned, fit, stage_bytes
from triton.runtime import interpreter

assert backends.interpreting(), "set TRITON_INTERPRET=1"
PATCH = interpreter._patch_lang_tensor


def with_index(tensor: type, scope: Any) -> None:
    """The interpreter of Triton 3.6 takes int() of an array (1,), which numpy refuses from 2.4 on."""
    PATCH(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = with_index
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def small_blocks(poisoned: None, monkeypatch: pytest.MonkeyPatch):
    """Blocks that end inside the tests' sizes, and NaN wherever a kernel does not write."""
    for module in (forward_module, attention_triton_backward):
        for table in (module.HALF_TILES, module.SINGLE_TILES):
            for size in table:
                monkeypatch.setitem(table, size, Tiles(Blocks(32, 16, 1, 1), Blocks(32, 16, 1, 1)))
    with use_backend("triton"):
        yield


def check(
    x: Inputs, mask: torch.Tensor | None = None, is_causal: bool = False, tolerance: float | None = None
) -> None:
    """O, tO and, twice looser, the gradients."""
    allowed = TOLERANCES[x.q.dtype] if tolerance is None else tolerance
    primals = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in x.primals]
    out, tangent, lse = attention_jvp(*primals, *x.tangents, mask, is_causal=is_causal)
    expected, expected_tangent = oracle(x, mask, is_causal)
    assert_close("O", out, expected, allowed)
    assert_close("tO", tangent, expected_tangent, allowed)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, primals, grad_out)
    for name, grad, reference in zip(
        ("dQ", "dK", "dV"), grads, gradients(x, grad_out, mask, is_causal), strict=True
    ):
        assert_close(name, grad, reference, 2 * allowed)
    assert lse.dtype == torch.float32
    dead = (expected == 0).all(-1)
    assert (lse[dead] == -torch.inf).all() and (tangent[dead] == 0).all()
    if not dead.all():
        reference_lse = log_sum_exp(x, mask, is_causal)
        assert_close("LSE", lse[~dead], reference_lse[~dead], 1e-6)


def log_sum_exp(x: Inputs, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    s = x.q.double() @ x.k.double().mT * x.q.shape[-1] ** -0.5
    if is_causal:
        s = s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.double()
    return s.logsumexp(-1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lq, lk, d", [(63, 77, 64), (33, 16, 40)])
def test_dtypes(dtype: torch.dtype, lq: int, lk: int, d: int) -> None:
    check(inputs(1, 1, lq, lk, d, dtype=dtype))


@pytest.mark.parametrize("d", [8, 12, 16, 72, 80, 128, 160, 256])
def test_head_sizes(d: int) -> None:
    check(inputs(1, 1, 5, 20, d, dtype=torch.float32 if d <= 64 else torch.float16))


@pytest.mark.parametrize(
    "lq, lk, d, dv", [(1, 50, 8, 8), (40, 1, 8, 8), (77, 15, 8, 24), (15, 97, 24, 8), (1, 1, 8, 8)]
)
def test_lengths_and_value_sizes(lq: int, lk: int, d: int, dv: int) -> None:
    x = inputs(1, 1, lq, lk, d, dv, dtype=torch.float32)
    if lk == 1:
        out, tangent, _ = attention_jvp(*x)
        assert_close("O", out, x.v.expand_as(out), 1e-6)
        assert_close("tO", tangent, x.tv.expand_as(out), 1e-6)
    else:
        check(x)


@pytest.mark.parametrize("lq, lk", [(77, 77), (40, 90), (90, 40)])
def test_causal(lq: int, lk: int) -> None:
    check(inputs(1, 1, lq, lk, 16, dtype=torch.float32), is_causal=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_no_scale_is_too_odd(scale: float) -> None:
    """A hidden score is hidden whatever it is multiplied by."""
    x = inputs(1, 1, 40, 40, 16, dtype=torch.float32)
    primals = [p.clone().requires_grad_() for p in x.primals]
    out, tangent, _ = attention_jvp(*primals, *x.tangents, is_causal=True, scale=scale)
    expected, change = oracle(x, is_causal=True, scale=scale)
    assert_close("O", out, expected, 2e-6)
    assert_close("tO", tangent, change, 2e-6)
    grad_out = torch.ones_like(out).cumsum(-1)
    plain = [p.detach().double().requires_grad_() for p in primals]
    wanted = torch.autograd.grad(
        explicit(*plain, is_causal=True, scale=scale), plain, grad_out.double(), materialize_grads=True
    )
    for got, want in zip(torch.autograd.grad(out, primals, grad_out), wanted, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5)


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    boolean = torch.rand(2, 2, 20, 41, generator=generator) > 0.4
    boolean[:, :, 2] = False
    boolean[:, :, 5, :20] = False
    infinite = torch.zeros(20, 41)
    infinite[1:3] = -torch.inf
    infinite[4, :17] = -torch.inf
    return {
        "boolean": boolean, "keys": boolean[0, 0, :1], "batch": boolean[:, :1, :1], "heads": boolean[:1],
        "bias": torch.randn(2, 2, 20, 41, generator=generator),
        "bias of keys": 3 * torch.randn(1, 41, generator=generator),
        "bias of heads": torch.randn(2, 1, 41, generator=generator), "infinite": infinite,
    }  # fmt: skip


@pytest.mark.parametrize("name", masks())
def test_masks(name: str) -> None:
    check(inputs(2, 2, 20, 41, 16, dtype=torch.float32), masks()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_finite_bias_on_whole_rows(dtype: torch.dtype) -> None:
    """O is the mean of V, as torch has it; other rows are untouched, and the gradients are finite."""
    x = inputs(1, 1, 20, 41, 16, dtype=dtype)
    bias = torch.zeros(20, 41, dtype=dtype)
    bias[3:6] = torch.finfo(dtype).min
    bias[7, :30] = torch.finfo(dtype).min
    primals = [p.clone().requires_grad_() for p in x.primals]
    out, tangent, lse = attention_jvp(*primals, *x.tangents, bias)
    assert_close(
        "O of the rows", out[:, :, 3:6], x.v.double().mean(2, True).expand(1, 1, 3, 16), TOLERANCES[dtype]
    )
    expected, expected_tangent = oracle(x, bias)
    others = [i for i in range(20) if i not in (3, 4, 5)]
    assert_close("O", out[:, :, others], expected[:, :, others], TOLERANCES[dtype])
    assert_close("tO", tangent[:, :, others], expected_tangent[:, :, others], TOLERANCES[dtype])
    assert lse.isfinite().all() and tangent.isfinite().all()
    grad_out = torch.randn_like(out)
    grad_out[:, :, 3:6] = 0
    grads = torch.autograd.grad(out, primals, grad_out)
    for name, grad, reference in zip(("dQ", "dK", "dV"), grads, gradients(x, grad_out, bias), strict=True):
        assert_close(name, grad, reference, 2 * TOLERANCES[dtype])


def test_hidden_pairs_hide_bad_keys() -> None:
    x = inputs(lq=20, lk=40, dtype=torch.float32)
    mask = (torch.arange(40) < 19)[None]
    for t in (x.k, x.tk):
        t[:, :, 19:] = torch.nan
    seen = Inputs(x.q, x.k[:, :, :19], x.v[:, :, :19], x.tq, x.tk[:, :, :19], x.tv[:, :, :19])
    for a, b in zip(attention_jvp(*x, mask), attention_jvp(*seen), strict=True):
        assert_close("as if the keys were cut off", a, b, 1e-6)


def test_tangent_and_gradient_of_a_bias() -> None:
    x = inputs(lq=20, lk=40, dtype=torch.float32)
    bias, change = torch.randn(2, 1, 40), torch.randn(2, 1, 40)
    wide = x.to(torch.float64)
    reference = torch.func.jvp(explicit, (*wide.primals, bias.double()), (*wide.tangents, change.double()))[1]
    assert_close("tO", attention_jvp(*x, bias, t_attn_mask=change)[1], reference, 2e-6)
    dual = torch.func.jvp(attention, (*x.primals, bias), (*x.tangents, change))[1]
    assert_close("tO of dual numbers", dual, reference, 2e-6)
    leaf = bias.clone().requires_grad_()
    attention(*x.primals, leaf).square().sum().backward()
    expected = torch.func.grad(lambda b: explicit(*wide.primals, b).square().sum())(bias.double())
    assert_close("dBias", leaf.grad, expected, 1e-5)


MISSING = [{n for i, n in enumerate(("tq", "tk", "tv")) if bits >> i & 1} for bits in range(1, 8)]


@pytest.mark.parametrize("missing", MISSING, ids=lambda m: "+".join(sorted(m)))
def test_missing_tangents(missing: set[str]) -> None:
    x = inputs(lq=20, lk=40, dtype=torch.float32)
    reference = oracle(x._replace(**{n: torch.zeros_like(getattr(x, n)) for n in missing}))[1]
    tangent = attention_jvp(*x._replace(**dict.fromkeys(missing)))[1]
    assert (tangent - reference).norm() <= 2e-6 * max(1, reference.norm())


def test_layouts_and_strides() -> None:
    x = inputs(lq=9, lk=20, dtype=torch.float32)
    views = Inputs(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x))
    check(Inputs(*views.primals, *x.tangents))
    check(Inputs(*x.primals, *views.tangents))
    room = [torch.full((*t.shape[:3], 2 * t.shape[3]), torch.nan)[..., ::2].copy_(t) for t in x]
    check(Inputs(*room))
    check(x._replace(tq=x.tq[:, :, :1].expand_as(x.q), tk=x.tk[:1].expand_as(x.k)))


def test_extreme_logits_and_offsets() -> None:
    x = inputs(1, 1, 33, 77, 32, dtype=torch.float32)
    check(x._replace(q=100 * x.q), tolerance=1e-4)
    flat = x._replace(q=torch.zeros_like(x.q))
    assert_close("tO of uniform weights", attention_jvp(*flat)[1], oracle(flat)[1], 2e-6)


def test_row_shift_keeps_half_precision_accurate() -> None:
    x = inputs(1, 1, 32, 512, 64)
    x = x._replace(k=x.k + 4, v=x.v + 4, tq=x.tq + 1).to(torch.float16)
    assert_close("tO", attention_jvp(*x)[1], oracle(x)[1], 1.5e-3)  # 1.8e-2 without


def test_transforms() -> None:
    x = inputs(lq=20, lk=24, dtype=torch.float32)
    other = inputs(lq=20, lk=24, dtype=torch.float32, seed=1)
    stacked = [torch.stack(pair) for pair in zip(x, other, strict=True)]
    batch = torch.func.vmap(lambda *a: torch.func.jvp(attention, a[:3], a[3:])[1])(*stacked)
    for got, y in zip(batch, (x, other), strict=True):
        assert_close("vmap of jvp", got, oracle(y)[1], 2e-6)


def test_cotangents_in_batches_and_layouts() -> None:
    """One LSE, shared by stride 0, for a batch of cotangents, and dO as a (B, L, H, D) tensor."""
    x = inputs(1, 2, 20, 24, dtype=torch.float32)
    cotangents = torch.stack([x.tq, inputs(1, 2, 20, 24, dtype=torch.float32, seed=1).tq])
    batches = torch.func.vmap(torch.func.vjp(attention, *x.primals)[1])(cotangents)
    for i, cotangent in enumerate(cotangents):
        for name, got, reference in zip(("dQ", "dK", "dV"), batches, gradients(x, cotangent), strict=True):
            assert_close(name, got[i], reference, 4e-6)
    y = inputs(2, 3, 20, 24, dtype=torch.float32)
    swapped = y.tq.transpose(1, 2).contiguous().transpose(1, 2)
    grads = torch.func.vjp(attention, *y.primals)[1](swapped)
    for name, got, reference in zip(("dQ", "dK", "dV"), grads, gradients(y, swapped), strict=True):
        assert_close(name, got, reference, 4e-6)


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2^30 elements apart in memory that is reserved, and touched only where the rows lie."""
    torch.use_deterministic_algorithms(False)
    x = inputs(1, 1, 3, 3, 16, dtype=torch.float16)
    far = []
    for t in x:
        room = torch.empty(2**31 + 64, dtype=torch.float16)
        far.append(room.as_strided(t.shape, (0, 0, 2**30, 1)).copy_(t))
    check(Inputs(*far))


def test_empty_inputs() -> None:
    for sizes in ({"batch": 0}, {"lq": 0}, {"lk": 0}):
        x = inputs(dtype=torch.float32, **sizes)
        out, tangent, lse = attention_jvp(*x)
        assert (out == 0).all() and (tangent == 0).all() and (lse == -torch.inf).all()


def test_atens_flash_backward_takes_aligned_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    room = torch.zeros(2 * 2 * 7 * 24 + 8, dtype=torch.float16)
    assert aligned(room.as_strided((2, 2, 7, 16), (336, 168, 24, 1)))
    assert not aligned(room.as_strided((2, 2, 7, 16), (336, 168, 20, 1)))
    assert not aligned(room[1:].as_strided((2, 2, 7, 16), (336, 168, 24, 1)))

    class OnCuda:
        device, dtype, shape = torch.device("cuda"), torch.float16, (2, 2, 7, 16)

        def __init__(self, row: int):
            self.rows = room.as_strided((2, 2, 7, 16), (336, 168, row, 1))
            self.stride, self.data_ptr, self.numel = self.rows.stride, self.rows.data_ptr, self.rows.numel

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    applies = attention_triton_backward.flash_applies
    for available in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda a=available: a)
        assert applies(OnCuda(24), OnCuda(24), OnCuda(24), None, False, 0.3) == available
        assert not applies(OnCuda(24), OnCuda(20), OnCuda(24), None, False, 0.3)
        assert applies(OnCuda(24), OnCuda(24), OnCuda(24), None, True, 0.3) == available
        assert not applies(OnCuda(24), OnCuda(24), OnCuda(24), None, True, -0.3)


def test_what_has_no_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="'triton' cannot run: it has no float64"):
        attention_jvp(*inputs())
    wide = inputs(1, 1, 5, 20, 72, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"'triton' cannot run: of float32 no tile is known .* above 64, here 72"
    ):
        attention_jvp(*wide)
    assert backends.triton_obstacle("cuda", torch.float32, 64) is None
    assert backends.triton_obstacle("cuda", torch.float16, 72) is None


@pytest.mark.parametrize("mask_size", [0, 1, 8])
@pytest.mark.parametrize("limit", [227, 163, 99, 64])
def test_blocks_shrink_to_the_device(limit: int, mask_size: int) -> None:
    for size, blocks in (
        (64, Blocks(128, 64, 3, 8)),
        (128, Blocks(128, 64, 2, 8)),
        (256, Blocks(64, 64, 2, 8)),
    ):
        fitted = fit(blocks, size, 2, limit * 1024, mask_size)
        assert stage_bytes(fitted, size, 2, mask_size) <= limit * 1024
        assert fitted == blocks or stage_bytes(blocks, size, 2, mask_size) > limit * 1024


def test_blocks_count_a_mask_and_its_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(forward_module, "fit", lambda *a: seen.append(a[-1]) or fit(*a))
    x, bias = inputs(dtype=torch.float16), torch.zeros(7, 9)
    attention_jvp(*x, bias, t_attn_mask=bias)
    attention_jvp(*x, bias.half())
    attention_jvp(*x, bias == 0)
    attention_jvp(*x)
    assert seen == [8, 2, 1, 0]
