"""The network between a picture's tokens and a text's: sizes, lengths along it, what looks at what."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fewstep.pipelines.visual_encoder import Attention, Resize, VisualEncoder

SMALL = {"in_tokens": 5, "out_tokens": 7, "out_width": 24, "channels": (32, 64), "blocks_per_level": 1}


def test_the_released_size() -> None:
    """197 tokens of CLIP ViT-B/16 to 77 of 768, as its code counts."""
    network = VisualEncoder()
    assert sum(p.numel() for p in network.parameters()) == 12_960_845
    lengths, widths = [], []
    for layer in network.layers:
        if isinstance(layer, Resize):
            layer.register_forward_hook(lambda m, args, out: lengths.append(out.shape[-1]))
        else:
            layer.register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))
    with torch.no_grad():
        assert network(torch.randn(2, 197, 768)).shape == (2, 77, 768)
    assert lengths == [256, 512, 768]
    assert list(dict.fromkeys(widths)) == [512, 256, 128, 77]
    assert sum(isinstance(layer, Attention) for layer in network.layers) == 3


def test_tokens_are_channels_whatever_their_width() -> None:
    network = VisualEncoder(**SMALL)
    assert network(torch.randn(3, 5, 40)).shape == (3, 7, 24)
    with torch.no_grad():
        whole = network(torch.arange(15 * 40).view(3, 5, 40).float().sin())
        parts = [network(torch.arange(15 * 40).view(3, 5, 40).float().sin()[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_attention_by_hand() -> None:
    layer, x = Attention(32, 32), torch.randn(2, 32, 6)
    h = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6)
    q, k, v = (conv(h) for conv in (layer.to_q, layer.to_k, layer.to_v))
    weights = (torch.einsum("bci,bcj->bij", q, k) / 32**0.5).softmax(-1)
    expected = x + layer.to_out(torch.einsum("bij,bcj->bci", weights, v))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    network, x = VisualEncoder(**SMALL), torch.randn(2, 5, 40)
    network.save_pretrained(tmp_path)
    copy = VisualEncoder.from_pretrained(tmp_path)
    copy.enable_gradient_checkpointing()
    for one in (network, copy):
        one(x).square().mean().backward()
    for a, b in zip(network.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert copy.gradient_checkpointing and not network.gradient_checkpointing


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_length_reaches_the_output_whatever_the_levels(levels: int) -> None:
    network = VisualEncoder(**{**SMALL, "channels": (32,) * levels})
    assert network(torch.randn(1, 5, 11)).shape == (1, 7, 24)
