"""Tiny diffusers models, unchanged, under torch.func.jvp with our attention: equal to torch's explicit attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_reference import assert_close
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import attention_backend
from fewstep.kernels import ForwardModeAttention, diffusers_hooks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Call = Callable[..., Tensor]


class ExplicitAttention(TorchFunctionMode):
    """Torch's explicit attention, with the inputs of group_norm made contiguous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def dit() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=4, patch_size=1,
        norm_num_groups=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    labels = torch.tensor([1, 2])
    model.eval()  # no random dropping of labels
    return model, lambda x, t: model(x, timestep=t, class_labels=labels).sample, (2, 4, 4, 4)


def unet() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, lambda x, t: model(x, t).sample, (2, 3, 8, 8)


def conditional_unet() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = torch.randn(2, 5, 12, dtype=torch.float64)
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def call(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, text.to(x.dtype), encoder_attention_mask=seen).sample

    return model, call, (2, 4, 8, 8)


def flux() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text, pooled = torch.randn(1, 5, 32, dtype=torch.float64), torch.randn(1, 32, dtype=torch.float64)
    text_ids, image_ids = torch.zeros(5, 3), torch.arange(48.0).view(16, 3)

    def call(x: Tensor, t: Tensor) -> Tensor:
        return model(
            x, encoder_hidden_states=text.to(x.dtype), pooled_projections=pooled.to(x.dtype), timestep=t,
            txt_ids=text_ids, img_ids=image_ids,
        ).sample  # fmt: skip

    return model, call, (1, 16, 4)


def sd3() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = SD3Transformer2DModel(
        sample_size=4, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=4, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    text, pooled = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)

    def call(x: Tensor, t: Tensor) -> Tensor:
        told = {"encoder_hidden_states": text.to(x.dtype), "pooled_projections": pooled.to(x.dtype)}
        return model(x, timestep=t, **told).sample

    return model, call, (2, 4, 4, 4)


def wan() -> tuple[nn.Module, Call, tuple[int, ...]]:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=8,
    )  # fmt: skip
    text = torch.randn(2, 5, 16, dtype=torch.float64)
    return model, lambda x, t: model(x, t, text.to(x.dtype)).sample, (2, 4, 2, 4, 4)


MODELS = [dit, unet, conditional_unet, flux, sd3, wan]


def model_jvp(call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, tx = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    t = torch.full((shape[0],), 0.3, dtype=dtype)
    with torch.no_grad():
        return torch.func.jvp(call, (x, t), (tx, torch.ones_like(t)))


def explicit_jvp(call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH), ExplicitAttention():
        return model_jvp(call, shape, dtype)


@pytest.mark.parametrize("build", MODELS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_models_under_the_function_mode(
    build: Callable[[], tuple[nn.Module, Call, tuple[int, ...]]], dtype: torch.dtype, tolerance: float
) -> None:
    model, call, shape = build()
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # some output layers start at zero
            p.copy_(0.1 * torch.randn(p.shape, dtype=torch.float64))
    expected, expected_tangent = explicit_jvp(call, shape, dtype)
    assert expected_tangent.norm() > 1e-2
    with ForwardModeAttention():
        out, tangent = model_jvp(call, shape, dtype)
    assert_close("output", out, expected, tolerance)
    assert_close("tangent", tangent, expected_tangent, tolerance)


def test_the_mode_makes_the_inputs_of_group_norm_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda x, *a: seen.append(x.is_contiguous()) or original(x, *a))
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with ForwardModeAttention():
        out = F.group_norm(x, 2)
    assert not x.is_contiguous() and seen == [True]
    assert_close("group norm", out, F.group_norm(x, 2), 1e-6)


def test_without_the_mode_stock_attention_fails() -> None:
    _, call, shape = dit()
    with pytest.raises(NotImplementedError):
        model_jvp(call, shape, torch.float32)


def test_gradient_of_a_model_in_one_pass_with_its_tangent() -> None:
    model, call, shape = unet()
    x, tx, t = torch.randn(shape), torch.randn(shape), torch.full((2,), 0.3)

    def gradient() -> Tensor:
        model.zero_grad()
        out, tangent = torch.func.jvp(lambda y: call(y, t), (x,), (tx,))
        (out - tangent.detach()).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with sdpa_kernel(SDPBackend.MATH), ExplicitAttention():
        expected = gradient()
    with ForwardModeAttention():
        assert_close("gradient", gradient(), expected, 1e-4)


@pytest.mark.parametrize("build", MODELS, ids=lambda b: b.__name__)
def test_wrapped_processors(build: Callable[[], tuple[nn.Module, Call, tuple[int, ...]]]) -> None:
    model, call, shape = build()
    model.double()
    expected = explicit_jvp(call, shape, torch.float64)
    count = diffusers_hooks.wrap_attention_processors(model)
    assert count == diffusers_hooks.wrap_attention_processors(model) > 0
    out, tangent = model_jvp(call, shape, torch.float64)
    assert_close("output", out, expected[0], 1e-10)
    assert_close("tangent", tangent, expected[1], 1e-10)


def test_a_wrapped_processor_keeps_its_keyword_arguments() -> None:
    from diffusers.models.attention_processor import Attention

    class Scaled:
        def __call__(self, attn: nn.Module, hidden_states: Tensor, strength: float = 1.0, **_: Any) -> Tensor:
            return strength * hidden_states

    module = Attention(8, heads=2, dim_head=4)
    module.set_processor(diffusers_hooks.wrap_processor(Scaled()))
    x = torch.randn(1, 3, 8)
    assert torch.equal(module(x, strength=3.0), 3 * x)


def test_a_model_without_attention_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="model is a Linear without attention processors"):
        diffusers_hooks.wrap_attention_processors(nn.Linear(2, 2))


@pytest.mark.parametrize("build", [flux, wan], ids=lambda b: b.__name__)
def test_the_dispatcher_takes_our_backend(
    build: Callable[[], tuple[nn.Module, Call, tuple[int, ...]]],
) -> None:
    assert diffusers_hooks.register_attention_backend() and diffusers_hooks.register_attention_backend()
    model, call, shape = build()
    model.double()
    expected = explicit_jvp(call, shape, torch.float64)
    with attention_backend("fewstep"):
        out, tangent = model_jvp(call, shape, torch.float64)
    assert_close("output", out, expected[0], 1e-10)
    assert_close("tangent", tangent, expected[1], 1e-10)
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    try:
        model.set_attention_backend("fewstep")
        assert_close("tangent", model_jvp(call, shape, torch.float64)[1], expected[1], 1e-10)
    finally:
        _AttentionBackendRegistry._active_backend = before


def test_a_changed_diffusers_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(diffusers_hooks.attention_dispatch, "_AttentionBackendRegistry")
    with pytest.warns(RuntimeWarning, match="attention backends have changed"):
        assert not diffusers_hooks.register_attention_backend()


def test_dropout_is_refused_under_the_mode() -> None:
    x = torch.randn(1, 1, 4, 8)
    with ForwardModeAttention(), pytest.raises(ValueError, match=r"dropout_p is 0\.5"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def test_torchs_argument_names_are_understood() -> None:
    x = torch.randn(1, 2, 4, 8)

    def call(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query=q, key=x, value=x, attn_mask=None, is_causal=True, scale=0.3
        )

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(call, (x,), (x,))[1]
    with ForwardModeAttention():
        assert_close("tO", torch.func.jvp(call, (x,), (x,))[1], expected, 2e-6)
