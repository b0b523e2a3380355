"""PatchGAN: sizes, where it looks, moments of the batch alone."""

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.methods.restoration.patch_discriminator import PatchDiscriminator
from fewstep.distill.methods.restoration.settings import PatchSettings


def test_the_published_one() -> None:
    """VQGAN's with ndf 64 and 4 layers: logits of 512 pixels on 30 x 30 places."""
    network = PatchDiscriminator(PatchSettings(), 512)
    assert network(torch.randn(2, 3, 512, 512)).shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in network.parameters()) == 6_960_961
    assert not list(network.buffers())


def test_a_logit_sees_its_patch_alone() -> None:
    """Two strided layers and two others, kernels of 4: 34 pixels."""
    network = PatchDiscriminator(PatchSettings(8, 2), 64).eval()
    for layer in network:
        if isinstance(layer, torch.nn.BatchNorm2d):  # its moments are of the whole batch
            layer.forward = lambda x: x
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    logits = network(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 34


def test_moments_are_those_of_the_batch_also_in_evaluation() -> None:
    network, images = PatchDiscriminator(PatchSettings(8, 2), 32), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network.train()(images), network.eval()(images))
    assert (network(images)[:1] - network(images[:1])).abs().max() > 1e-3


def test_too_many_layers_for_the_pictures() -> None:
    PatchDiscriminator(PatchSettings(8, 3), 32)
    with pytest.raises(UserError, match=r"method.discriminator.layers: 4 leave nothing of 32 pixels"):
        PatchDiscriminator(PatchSettings(8, 4), 32)
