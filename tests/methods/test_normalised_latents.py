"""Statistics of each element of the latents, and the way to pictures and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.consistency_training.normalised_latents import NormalisedLatents, Statistics
from fewstep.distill.methods.space import ClassLatentSpace
from fewstep.distill.models.codec import Autoencoder
from fewstep.distill.training.contract import Batch
from fewstep.pipelines.latent_statistics import LatentStatistics

from .ict_parts import latent_teacher
from .lct_parts import Cached, statistics


@pytest.fixture
def codec(tiny_pipeline: Path) -> Autoencoder:
    return Autoencoder(latent_teacher(tiny_pipeline).vae, "tiny")


def measured(codec: Autoencoder, sigma_data: float = 0.5, batch_size: int = 1024) -> Statistics:
    out = Statistics((4, 8, 8), sigma_data)
    out.measure(Cached(), codec, batch_size)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("batch_size", [1, 7, 40, 1024])
def test_statistics_are_those_of_each_element(codec: Autoencoder, batch_size: int) -> None:
    ours, (mean, std) = measured(codec, batch_size=batch_size), statistics()
    np.testing.assert_allclose(ours.mean.numpy(), mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.std.numpy(), std, rtol=1e-5)
    assert std.std() > 0.3 * std.mean()  # one number for all, or for a channel, would be another thing


def test_a_far_offset_costs_no_precision(codec: Autoencoder) -> None:
    """As the mean of squares less the square of the mean would."""
    far = Cached()
    far.posteriors[:, :4] += 1e4
    out = Statistics((4, 8, 8), 0.5)
    out.measure(far, codec, 7)  # type: ignore[arg-type]
    expected = far.posteriors.double()
    spread = (expected[:, :4].var(0, correction=0) + expected[:, 4:].exp().mean(0)).sqrt()
    torch.testing.assert_close(out.std.double(), 0.18215 * spread, rtol=1e-6, atol=0)


def test_shift_and_scale_of_the_autoencoder_do_not_matter_to_samples(codec: Autoencoder) -> None:
    posterior = Cached()[range(6)]
    before = measured(codec).normalised(codec.latents(posterior, Draws(0, 0, range(6))))
    config = codec.vae.config
    kept = config.scaling_factor, config.get("shift_factor")
    codec.vae.register_to_config(scaling_factor=1.7, shift_factor=0.4)
    try:
        after = measured(codec).normalised(codec.latents(posterior, Draws(0, 0, range(6))))
    finally:
        codec.vae.register_to_config(scaling_factor=kept[0], shift_factor=kept[1])
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_samples_have_the_deviation_of_the_process_in_every_element(
    codec: Autoencoder, sigma_data: float
) -> None:
    """Each posterior drawn 100 times; the standard error of a deviation of 4,000 draws is about 1 %."""
    space = NormalisedLatents(ClassLatentSpace(codec, (4, 8, 8), (), 0), measured(codec, sigma_data))
    assert space.needs == {"latents"} and space.shape == (4, 8, 8)
    every = [
        space.samples(Batch(Draws(1, i, range(40)), latents=Cached()[range(40)])).double() for i in range(100)
    ]
    x0 = torch.cat(every)
    assert (x0.std(0) / sigma_data - 1).abs().max() < 0.08
    assert abs(x0.std(0).mean().item() / sigma_data - 1) < 0.005
    assert (x0.mean(0) / sigma_data).abs().max() < 0.08


def test_the_way_to_pictures_undoes_the_normalisation(codec: Autoencoder) -> None:
    """decode(normalise(z)) is the autoencoder's own decoding of the raw latent."""
    found = measured(codec)
    space = NormalisedLatents(ClassLatentSpace(codec, (4, 8, 8), (), 0), found)
    posterior = Cached()[range(3)]
    raw = posterior[:, :4] + (posterior[:, 4:] / 2).exp() * Draws(2, 0, range(3)).normal((4, 8, 8))
    x0 = space.samples(Batch(Draws(2, 0, range(3)), latents=posterior))
    with torch.no_grad():
        ours, expected = space.decode(x0), codec.vae.decode(raw).sample
    assert (ours - expected).abs().max() < 1e-5 and expected.std() > 0.01
    mean, std = (torch.from_numpy(a).float() for a in statistics())
    torch.testing.assert_close(x0, 0.5 * (0.18215 * raw - mean) / std, rtol=1e-4, atol=1e-5)
    exported = LatentStatistics((4, 8, 8), 0.5)
    exported.load_state_dict(found.state_dict())
    torch.testing.assert_close(exported.restored(x0), 0.18215 * raw, rtol=1e-4, atol=1e-5)
