"""open_clip models as scorers, on a tiny one with random weights, against transformers and torchmetrics."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.errors import UserError
from fewstep.distill.scorers.by_name import make_scorer
from fewstep.distill.scorers.image_text import CLIP_SCORE, image_text_protocol, pair_cosines
from fewstep.distill.scorers.open_clip import PRESETS, OpenClipScorer
from open_clip.pretrained import _PRETRAINED, _pcfg
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from . import tiny_clip
from .tiny_clip import NAME

CAPTIONS = ["a red apple", "fire truck", "two cats on a wooden table", "Egypt, at night!"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_clip")
    tiny_clip.register(folder)
    return tiny_clip.save_random(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def scorer(weights: Path) -> OpenClipScorer:
    return OpenClipScorer(NAME, weights=weights)


@pytest.fixture
def tagged(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags of the tiny model: one that needs QuickGELU, one that squashes, one that is not there."""
    tags = {
        "openai": _pcfg(quick_gelu=True, file=str(weights)),
        "squashed": _pcfg(resize_mode="squash", interpolation="bilinear", mean=(0.5,) * 3, file=str(weights)),
        "padded": _pcfg(resize_mode="longest", file=str(weights)),
        "remote": _pcfg(hf_hub="fewstep/none/"),
    }
    monkeypatch.setitem(_PRETRAINED, NAME, tags)
    monkeypatch.setitem(_PRETRAINED, f"{NAME}-quickgelu", {"openai": tags["openai"]})


def pictures(n: int = 4, height: int = 48, width: int = 48) -> Tensor:
    coarse = torch.rand(n, 3, 6, 6)
    x = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (x * 255).round().byte()


def test_cosines_are_those_of_open_clip_called_by_hand(weights: Path, scorer: OpenClipScorer) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, str(weights))
    model.eval()
    images = pictures(height=60, width=44)
    with torch.no_grad():
        a = model.encode_image(torch.stack([preprocess(to_pil_image(x)) for x in images]))
        b = model.encode_text(open_clip.get_tokenizer(NAME)(CAPTIONS))
    expected = F.cosine_similarity(a.double(), b.double())
    got = pair_cosines(scorer, images, CAPTIONS)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 0.01
    squashed = OpenClipScorer(NAME, weights=weights, fit="squash")
    assert (pair_cosines(squashed, images, CAPTIONS) - expected).abs().max() > 0.05
    with torch.no_grad():
        exact = model.encode_image(scorer.picture_rule(images.float() / 255))
    assert torch.allclose(got, F.cosine_similarity(exact.double(), b.double()), atol=1e-6)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("side", "tolerance"), [(32, 2e-4), (48, 0.3)])
def test_the_number_is_that_of_torchmetrics_on_transformers(
    weights: Path, quick: bool, side: int, tolerance: float
) -> None:
    """Without a resize to float32's digits; with one up to PIL's rounding to 8 bits."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPImageProcessor

    model = tiny_clip.in_transformers(load_file(weights), "quick_gelu" if quick else "gelu")
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = open_clip.get_tokenizer(NAME)

    class Poolers(torch.nn.Module):
        """Vectors instead of transformers 5's output objects, which torchmetrics 1.9 cannot read."""

        config = model.config

        def get_image_features(self, *inputs: Any) -> Tensor:
            return model.get_image_features(*inputs).pooler_output

        def get_text_features(self, *inputs: Any) -> Tensor:
            return model.get_text_features(*inputs).pooler_output

    def processor(images: Any = None, text: Any = None, **_: Any) -> Any:
        if images is not None:
            return prepare(images=images, return_tensors="pt")
        ids = tokenizer(text)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    metric = CLIPScore(model_name_or_path=lambda: (Poolers(), processor))
    images, captions = pictures(6, side, side), [*CAPTIONS, "dog", "a blue car"]
    cosines = pair_cosines(OpenClipScorer(f"{NAME}{'-quickgelu' * quick}", weights=weights), images, captions)
    metric.update(images, captions)
    assert cosines.mean() > 0.1
    assert CLIP_SCORE.of(cosines) == pytest.approx(float(metric.compute()), abs=tolerance)
    metric.reset()
    metric.update(images[:1], captions[:1])
    assert 100 * float(cosines[0]) == pytest.approx(float(metric.score), abs=3 * tolerance)


def test_quickgelu_follows_the_tag_and_changes_the_number(tagged: None, weights: Path) -> None:
    images = pictures()
    plain, quick = (OpenClipScorer(f"{NAME}{end}", weights=weights) for end in ("", "-quickgelu"))
    by_tag = OpenClipScorer(NAME, "openai")
    assert torch.equal(pair_cosines(by_tag, images, CAPTIONS), pair_cosines(quick, images, CAPTIONS))
    assert (pair_cosines(plain, images, CAPTIONS) - pair_cosines(quick, images, CAPTIONS)).abs().max() > 1e-3
    assert "QuickGELU" in by_tag.text_rule and "QuickGELU" not in plain.text_rule


def test_preprocessing_follows_the_tag_with_a_local_copy_too(tagged: None, weights: Path) -> None:
    for scorer in (OpenClipScorer(NAME, "squashed"), OpenClipScorer(NAME, "squashed", weights)):
        rule = scorer.picture_rule
        assert (rule.size, rule.fit, rule.kernel, rule.mean) == (32, "squash", "bilinear", (0.5, 0.5, 0.5))
    assert OpenClipScorer(NAME, "openai").picture_rule.fit == "shortest"
    with pytest.raises(UserError, match="resize longest"):
        OpenClipScorer(NAME, "padded")


def test_the_hash_is_the_files(scorer: OpenClipScorer, weights: Path) -> None:
    assert scorer.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_long_captions_are_cut_but_keep_their_end(scorer: OpenClipScorer) -> None:
    long = "dog " * 200
    tokens = scorer.tokenizer([long])
    assert tokens.shape == (1, 77) and tokens[0, -1] == 49407
    assert torch.allclose(scorer.encode_texts([long]), scorer.encode_texts(["dog " * 300]))


def test_a_prefix_is_the_token_prefix_of_dmd2(weights: Path) -> None:
    """DMD2 inserts the tokens of the prefix after the start token, cuts at 77 and sets the end token again."""
    plain, prefixed = (OpenClipScorer(NAME, weights=weights, prefix=p) for p in ("", "A photo depicts "))
    captions = [*CAPTIONS, " ".join(["dog"] * 73), " ".join(["dog"] * 74), " ".join(["cat"] * 100)]
    tokens = open_clip.tokenize(captions)
    prefix = open_clip.tokenize("A photo depicts ")[:, 1:4].expand(len(captions), 3)
    joined = torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], 1)[:, :77]
    joined[:, 76] = torch.where(joined[:, 76] > 0, 49407, joined[:, 76])
    with torch.no_grad():
        expected = F.normalize(prefixed.network.encode_text(joined), dim=-1)
    assert torch.allclose(prefixed.encode_texts(captions), expected, atol=1e-5)
    assert (plain.encode_texts(captions) - expected).abs().max() > 1e-2
    assert "'A photo depicts '" in prefixed.text_rule


def test_presets_name_models_tags_and_activations_of_open_clip() -> None:
    for preset in PRESETS.values():
        assert preset.pretrained in open_clip.list_pretrained_tags_by_model(preset.model)
        config, tag = (
            open_clip.get_model_config(preset.model),
            open_clip.get_pretrained_cfg(preset.model, preset.pretrained),
        )
        assert bool(config.get("quick_gelu")) == bool(tag.get("quick_gelu"))
    assert {(p.model, p.pretrained, p.prefix, p.lanczos, p.fit) for p in PRESETS.values()} == {
        ("ViT-L-14-quickgelu", "openai", "", None, None),
        ("ViT-B-32-quickgelu", "openai", "A photo depicts", None, None),
        ("ViT-g-14", "laion2b_s12b_b42k", "A photo depicts", 256, None),
        ("ViT-H-14", "laion2b_s32b_b79k", "", None, "squash"),
    }


def test_every_preset_is_a_protocol_of_its_own(tagged: None) -> None:
    """Also on the same model and weights; and each differs in its number."""
    images, ids, values = pictures(height=60, width=40), set(), []
    for name, preset in PRESETS.items():
        own = replace(preset, model=NAME, pretrained="openai")
        scorer = own.load(name)
        cosines = pair_cosines(scorer, images, CAPTIONS)
        values.append(round(own.measure.of(cosines), 6))
        protocol = image_text_protocol(
            scorer,
            own.measure,
            captions=CAPTIONS,
            input="uint8",
            conditioning="caption",
            seed_rule="i",
            image_size=48,
        )
        ids.add(replace(protocol, extractor="same").id)
    assert len(ids) == len(PRESETS) and len(set(values)) == len(PRESETS)


def test_specs_become_scorers(tagged: None, weights: Path) -> None:
    for spec, name in (
        (f"{NAME}:squashed", f"{NAME}-squashed"),
        (f"{NAME}:{weights}", f"{NAME}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"),
        (f"{NAME}:openai:{weights}", f"{NAME}-openai"),
    ):
        scorer, measure = make_scorer(spec)
        assert scorer.name == name and measure is CLIP_SCORE
        assert measure.label(scorer) == f"CLIP score {name}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-L14:openai", "no such open_clip model; the nearest is ViT-L-14"),
        ("ViT-L-14:opnai", "no pretrained tag 'opnai'; open_clip has openai, "),
        ("ViT-L-14-quickgelu:laion2b_s32b_b82k", "no pretrained tag 'laion2b_s32b_b82k'"),
        (f"{NAME}:remote", f"{NAME}, tag remote: weights neither in the cache nor reachable .* local copy"),
        (f"{NAME}:/none/weights.pt", "/none/weights.pt: no such weights file"),
        ("dmd2-vit-g-14:/none/weights.pt", "ViT-g-14: /none/weights.pt: no such weights file"),
        ("clip", "'clip'; give MODEL:TAG or MODEL:FILE .* lite0-minilm.* dmd2-vit-g-14"),
        ("lite0-minilm:x", "'lite0-minilm:x'; give MODEL:TAG"),
        ("ViT-L-14:", "'ViT-L-14:'; give MODEL:TAG"),
    ],
)
def test_what_is_missing_is_one_line(tagged: None, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_scorer(spec)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_weights_of_another_network_are_refused(tmp_path: Path, tagged: None) -> None:
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("other.pt", "torn.safetensors"):
        with pytest.raises(UserError, match=f"{name} do not fit .* give this model's checkpoint") as raised:
            OpenClipScorer(NAME, weights=tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="which weights"):
        OpenClipScorer(NAME)
