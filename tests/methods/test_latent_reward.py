"""The latent proxy reward model: losses at recorded values, its size, what matching trains."""

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.errors import UserError
from fewstep.distill.methods.latent_consistency.latent_reward import (
    LatentReward,
    contrastive_loss,
    pair_accuracy,
    preference_loss,
)
from fewstep.distill.methods.latent_consistency.settings import LRMSettings

EXPERT = torch.tensor([[27.1, 25.4, 30.2, 28.0], [27.9, 25.1, 30.5, 26.5], [28.6, 26.0, 29.8, 27.2]]).double()
LATENT = torch.tensor([[21, 19, 25.5, 24], [21.5, 20, 25, 23], [22.5, 18.5, 26, 22]]).double()
TINY = LRMSettings(vision_width=16, vision_layers=3, vision_heads=2, patch_size=2, embed_dim=8, text_layers=1)


def test_the_preference_loss_and_its_pairs() -> None:
    pairs = [preference_loss(EXPERT[[i, j]], LATENT[[i, j]]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairs == pytest.approx([0.0788903, 0.0936376, 0.3420370], abs=3e-7)
    assert preference_loss(EXPERT, LATENT).item() == pytest.approx(0.5145649, abs=3e-7)
    assert pair_accuracy(EXPERT, LATENT).item() == pytest.approx(0.416667, abs=1e-6)


def test_the_smoothed_preference_is_a_draw_where_a_generated_latent_beats_the_real_one() -> None:
    smooth = preference_loss(EXPERT, LATENT, smooth=True).item()
    assert smooth == pytest.approx(0.0788903 + 0.1528805 + 0.2855667, abs=2e-7)
    assert smooth == pytest.approx(0.5173375, abs=3e-7)


def test_wrong_losses_are_other_numbers() -> None:
    """Recorded beside the right one: reverse divergence, one softmax over all three, no temperature."""
    assert preference_loss(LATENT, EXPERT).item() == pytest.approx(0.4819078, abs=3e-7)
    threefold = F.kl_div(LATENT.log_softmax(0), EXPERT.softmax(0), reduction="none").sum(0).mean()
    assert threefold.item() == pytest.approx(0.2191575, abs=3e-7)
    assert preference_loss(EXPERT, LATENT / 100).item() == pytest.approx(0.2321890, abs=3e-7)


def test_the_gradient_of_the_preference_loss() -> None:
    latent = LATENT.clone().requires_grad_()
    preference_loss(EXPERT, latent).backward()
    assert latent.grad is not None
    assert latent.grad[0].tolist() == pytest.approx([0.016879, -0.009346, -0.006061, 0.026077], abs=1e-6)
    torch.testing.assert_close(latent.grad.sum(0), torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_equal_logits_up_to_a_shift_of_a_caption_cost_nothing() -> None:
    shift = torch.randn(4).double()
    assert preference_loss(EXPERT, EXPERT + shift).item() == pytest.approx(0, abs=1e-12)


def test_the_vision_tower_has_the_official_size() -> None:
    """latent_ViT: 64 x 64 x 4 latents, 256 + 1 tokens of width 512, about 38.5 M parameters."""
    with torch.device("meta"):
        model = LatentReward((4, 64, 64), 768, LRMSettings())
    assert sum(p.numel() for p in model.vision.parameters()) == pytest.approx(38.5e6, rel=5e-3)
    assert model.vision.positional_embedding.shape == (257, 512)
    locked = {id(p) for p in model.locked()}
    free = [n for n, p in model.named_parameters() if id(p) not in locked and n.startswith("vision")]
    assert all(
        n.startswith(("vision.transformer.resblocks.11.", "vision.ln_post", "vision.proj")) for n in free
    )
    assert len(free) > 10 and {id(p) for p in model.unlocked()} & locked == set()
    assert all(id(p) not in locked for n, p in model.named_parameters() if not n.startswith("vision"))


def test_it_sees_latents_of_its_own_size_and_every_token() -> None:
    model = LatentReward((4, 8, 8), 16, TINY)
    latents, states = torch.randn(3, 4, 8, 8), torch.randn(3, 12, 16)
    score = model(latents, states)
    assert score.shape == (3,) and score.abs().max() <= 1
    for i in range(12):
        changed = states.clone()
        changed[:, i] += 1
        assert not torch.equal(model(latents, changed), score), i
    assert torch.allclose(model(latents[:1], states[:1]), score[:1], atol=1e-6)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model.scale.item() == pytest.approx(100)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.lrm.patch_size: 3 does not divide the latents' side 8"):
        LatentReward((4, 8, 8), 16, LRMSettings(patch_size=3))
    with pytest.raises(UserError, match=r"method\.lrm.vision_heads: 7 does not divide vision_width 512"):
        LatentReward((4, 8, 8), 16, LRMSettings(vision_heads=7))


def test_the_contrastive_loss_is_clips_but_for_equal_captions() -> None:
    images, texts = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    scale = torch.tensor(5.0)
    logits = scale * images @ texts.T
    plain = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert contrastive_loss(images, texts, scale, list("abcd")).item() == pytest.approx(plain.item())
    texts[1] = texts[0]
    shared = contrastive_loss(images, texts, scale, list("aacd"))
    logits = scale * images @ texts.T
    logits[0, 1] = logits[1, 0] = -1e9
    expected = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert shared.item() == pytest.approx(expected.item(), rel=1e-6)
