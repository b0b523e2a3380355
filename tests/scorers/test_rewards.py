"""Rewards: gradients in the pictures alone, ImageReward by its call signature, HPSv2 and PickScore from tiny files."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.errors import UserError
from fewstep.distill.scorers import by_name as scorers
from fewstep.distill.scorers.by_name import make_scorer
from fewstep.distill.scorers.image_text import Scorer
from fewstep.distill.scorers.lite_minilm import LiteMiniLM
from fewstep.distill.scorers.pickscore import PickScore
from fewstep.distill.scorers.picture_rule import PictureRule
from fewstep.distill.scorers.rewards import ImageRewardReward, ScorerReward, capped, load_reward
from safetensors.torch import load_file
from torch import Tensor, nn

from . import tiny_clip

CAPTIONS = ["red apple", "tiger face"]


def test_the_offline_reward_is_its_scorers_cosine_with_a_gradient_in_the_pictures_alone() -> None:
    reward = load_reward("lite2-minilm").train()
    assert (
        isinstance(reward, ScorerReward)
        and isinstance(reward.scorer, LiteMiniLM)
        and not reward.scorer.training
    )
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    score = reward(pictures, CAPTIONS)
    prepared = F.interpolate(pictures, (128, 128), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    images = F.normalize(reward.scorer.network.encode_image(prepared), dim=1)
    cosine = (images * reward.scorer.encode_texts(CAPTIONS)).sum(1)
    torch.testing.assert_close(score, cosine, rtol=0, atol=1e-5)
    score.sum().backward()
    assert pictures.grad is not None and (pictures.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())
    logits = reward.logits(pictures, CAPTIONS, torch.tensor(7.0))
    torch.testing.assert_close(logits, reward.scorer.network.logit_scale.exp() * score)
    assert reward.best == 1.0

    ahead = pictures.detach() + 0.01 * pictures.grad / pictures.grad.norm()
    assert (reward(ahead.clamp(0, 1), CAPTIONS) > score).all()


class Unfrozen(Scorer):
    """Encoders whose weights were left trainable."""

    name, weights_sha256, text_rule, num_features = "unfrozen", "0" * 64, "length", 3
    picture_rule = PictureRule(8, "squash", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(1, 3)

    def image_vectors(self, pictures: Tensor) -> Tensor:
        return pictures.mean((2, 3))

    def text_vectors(self, texts: list[str]) -> Tensor:
        return self.text(torch.tensor([[float(len(t))] for t in texts]))


def test_no_gradient_reaches_the_texts() -> None:
    scorer, pictures = Unfrozen(), torch.rand(2, 3, 8, 8, requires_grad=True)
    assert not scorer.encode_texts(CAPTIONS).requires_grad
    scorer.similarity(pictures, CAPTIONS).sum().backward()
    assert pictures.grad is not None and pictures.grad.any() and scorer.text.weight.grad is None


def test_autocast_does_not_reach_a_reward() -> None:
    reward, pictures = load_reward("lite2-minilm"), torch.rand(2, 3, 32, 32)
    plain = reward(pictures, CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            reward(pictures.bfloat16().float(), CAPTIONS), reward(pictures.bfloat16(), CAPTIONS)
        )
        assert torch.equal(reward(pictures, CAPTIONS), plain)


class Tokens(dict):
    input_ids = property(lambda self: self["ids"])
    attention_mask = property(lambda self: self["mask"])

    def to(self, device: Any) -> "Tokens":
        return self


class StandIn(nn.Module):
    """What ImageReward 1.5 gives, by the calls of its model: blip.tokenizer, device, score_gard(ids, mask, image)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.device = nn.Linear(3, 1), "cpu"
        self.blip = SimpleNamespace(tokenizer=self.tokenize)

    def tokenize(self, texts: list[str], **options: Any) -> Tokens:
        assert options == {
            "padding": "max_length",
            "truncation": True,
            "max_length": 35,
            "return_tensors": "pt",
        }
        ids = torch.tensor([[len(t)] * 35 for t in texts])
        return Tokens(ids=ids, mask=torch.ones_like(ids))

    def score_gard(self, prompt_ids: Tensor, prompt_attention_mask: Tensor, image: Tensor) -> Tensor:
        assert image.shape[1:] == (3, 224, 224) and prompt_attention_mask.shape == prompt_ids.shape
        assert torch.device(self.device) == image.device
        return self.layer(image.mean((2, 3))) + prompt_ids[:, :1] / 10


def test_image_reward_is_capped_at_two_and_called_as_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.tensor([-1, 0.5, 1.9, 2, 2.7], requires_grad=True)
    assert capped(raw).tolist() == pytest.approx([-3, -1.5, -0.1, 0, 0])
    capped(raw).sum().backward()
    assert raw.grad is not None and raw.grad.tolist() == [1, 1, 1, 0, 0]

    model = StandIn()
    package = SimpleNamespace(load=lambda name, device: (model, name, device)[0])
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    reward = load_reward("image-reward")
    assert isinstance(reward, ImageRewardReward) and reward.best == 0
    pictures = torch.rand(2, 3, 32, 40, requires_grad=True)
    score = reward(pictures, CAPTIONS)
    r = model.score_gard(torch.tensor([[9], [10]]), torch.ones(2, 1), reward.picture_rule(pictures.detach()))
    torch.testing.assert_close(score, -(2 - r.squeeze(1)).clamp(min=0))
    score.sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0
    assert all(p.grad is None for p in reward.parameters())
    torch.testing.assert_close(reward.logits(pictures, CAPTIONS, torch.tensor(50.0)), 50 * score)


def test_a_missing_package_or_weights_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, message in (
        ("image-reward", r"method\.reward: image-reward needs the package image-reward"),
        ("hpsv2", r"HPS_v2\.1_compressed\.pt is neither in the cache nor reachable"),
        (f"pickscore:{tmp_path}/none", "scorer pickscore: no weights or tokenizer"),
        ("nonsense", "scorer: 'nonsense'; give MODEL:TAG or MODEL:FILE of open_clip, or one of lite0-minilm"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            load_reward(name)
        assert "\n" not in str(refused.value)


def test_hpsv2_is_an_open_clip_model_with_weights_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file holds them under "state_dict"; here with those of a tiny model of the same classes."""
    tiny_clip.register(tmp_path)
    weights = load_file(tiny_clip.save_random(tmp_path / "weights.safetensors"))
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "hps.pt")
    monkeypatch.setattr(scorers, "HPSV2_MODEL", tiny_clip.NAME)
    scorer, measure = make_scorer(f"hpsv2:{tmp_path / 'hps.pt'}")
    plain, _ = make_scorer(f"{tiny_clip.NAME}:{tmp_path / 'weights.safetensors'}")
    pictures = torch.rand(2, 3, 32, 32)
    assert (scorer.name, measure.metric, measure.scale) == ("hpsv2.1", "image-text cosine", 1.0)
    assert torch.equal(scorer.similarity(pictures, CAPTIONS), plain.similarity(pictures, CAPTIONS))
    assert scorer.logit_scale.item() == pytest.approx(weights["logit_scale"].exp().item())


def test_pickscore_is_transformers_clip(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Tiny random weights: cosines as the model's own forward gives them, up to its temperature."""
    from transformers import CLIPTokenizer

    weights = load_file(save_tiny(tmp_path))
    model = tiny_clip.in_transformers(weights, "gelu")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")
    model.config.text_config.eos_token_id = tokenizer.eos_token_id
    model.text_model.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "pick")
    tokenizer.save_pretrained(tmp_path / "pick")
    scorer, _ = make_scorer(f"pickscore:{tmp_path / 'pick'}")
    assert isinstance(scorer, PickScore) and scorer.num_features == 16 and len(scorer.weights_sha256) == 64
    pictures, texts = torch.rand(2, 3, 32, 32, requires_grad=True), ["red cat", "dog"]
    cosines = scorer.similarity(pictures, texts)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**tokens, pixel_values=scorer.picture_rule(pictures)).logits_per_image.diagonal()
    torch.testing.assert_close(scorer.logit_scale * cosines, theirs, rtol=1e-4, atol=1e-4)
    cosines.sum().backward()
    assert pictures.grad is not None and pictures.grad.norm() > 0
    assert all(p.grad is None for p in scorer.parameters())


def save_tiny(folder: Path) -> Path:
    tiny_clip.register(folder)
    return tiny_clip.save_random(folder / "weights.safetensors")
