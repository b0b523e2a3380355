"""The autoencoder's loss and its augmentation."""

import math

import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.pretrain.autoencoder import Autoencoder
from fewstep.distill.pretrain.settings import AutoencoderSettings
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress


def small(**changes):
    settings = AutoencoderSettings(block_out_channels=(16, 16), **changes)
    return Autoencoder(settings, Parts(None, StudentSettings(), []))


def images(count=4):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_loss_is_the_weighted_sum_of_its_parts():
    method = small(l1_weight=0.7, l2_weight=3.0, kl_weight=0.01, max_shift=0, recolour=0.0)
    x = images()
    out = method("autoencoder", Batch(Draws(0, 0, range(4)), images=x), Progress(0, 1, {}), {})

    draws = Draws(0, 0, range(4))
    mirrored = draws.uniform() < 0.5
    for _ in range(6):  # recolouring, two shifts, three channel keys
        draws.uniform()
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    with torch.no_grad():
        moments = method.vae.encode(x).latent_dist.parameters
        mean, logvar = moments.chunk(2, dim=1)
        error = method.vae.decode(mean + (logvar / 2).exp() * draws.normal(mean.shape[1:])).sample - x
    kl = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).mean()
    expected = 0.7 * error.abs().mean() + 3.0 * (error**2).mean() + 0.01 * kl
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-6)
    assert math.isclose(out["psnr"].item(), -10 * math.log10(float((error**2).mean()) / 4), rel_tol=1e-4)


def test_augmentation_keeps_pixels_and_moves_them_as_said():
    x = images(32)
    plain = small(max_shift=0, recolour=0.0).augment(x, Draws(0, 0, range(32)))
    is_same = (plain == x).flatten(1).all(1)
    is_mirror = (plain == x.flip(-1)).flatten(1).all(1)
    assert (is_same | is_mirror).all() and is_same.any() and is_mirror.any()

    recoloured = small(max_shift=0, recolour=1.0).augment(x, Draws(0, 0, range(32)))
    assert torch.equal(recoloured.sum(1), plain.sum(1)) or torch.allclose(recoloured.sum(1), plain.sum(1))
    assert not torch.equal(recoloured, plain)

    shifted = small(max_shift=2, recolour=0.0).augment(x, Draws(0, 0, range(32)))
    found = [any(torch.equal(s[:, 2:-2, 2:-2], c) for c in crops(o)) for s, o in zip(shifted, x, strict=True)]
    assert all(found) and not torch.equal(shifted, plain)


def crops(image):
    for flipped in (image, image.flip(-1)):
        for dy in range(5):
            for dx in range(5):
                yield flipped[:, dy : dy + 4, dx : dx + 4]


def test_training_lowers_the_error():
    torch.manual_seed(0)
    method = small()
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for i in range(30):
        colours = images()[..., :1, :1].expand(4, 3, 8, 8)
        batch = Batch(Draws(0, i, range(4)), images=colours)
        loss = method("autoencoder", batch, Progress(i, 30, {}), {})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
