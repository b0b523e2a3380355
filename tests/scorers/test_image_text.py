"""From pictures and captions to numbers: with the offline scorer, and with a linear one whose cosines are known."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.data.sources import load_data
from fewstep.distill.scorers import image_text
from fewstep.distill.scorers.image_text import (
    CLIP_SCORE,
    CLIP_SCORE_HESSEL,
    COSINE,
    Measure,
    Scorer,
    image_text_protocol,
    pair_cosines,
)
from fewstep.distill.scorers.lite_minilm import LiteMiniLM
from fewstep.distill.scorers.picture_rule import PictureRule
from torch import Tensor, nn

SETTING = {"input": "uint8 rounded", "conditioning": "caption", "seed_rule": "i", "image_size": 32}


class Colours(Scorer):
    """A picture's mean colour; a text's vector is looked up in `words`, and counted."""

    name, weights_sha256, text_rule, num_features = "colours", "0" * 64, "words", 3
    picture_rule = PictureRule(4, "squash", "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self) -> None:
        super().__init__()
        self.words = {"red": (1.0, 0.0, 0.0), "green": (0.0, 2.0, 0.0), "not red": (-1.0, 0.0, 0.0)}
        self.scale = nn.Parameter(torch.full((3,), 5.0), requires_grad=False)
        self.drop = nn.Dropout(0.5)
        self.asked: list[str] = []

    def image_vectors(self, pictures: Tensor) -> Tensor:
        return self.drop(pictures.mean((2, 3)) * self.scale)

    def text_vectors(self, texts: list[str]) -> Tensor:
        self.asked += texts
        return torch.tensor([self.words[t] for t in texts])


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Colours:
    monkeypatch.setattr(image_text, "_TEXTS", {})
    return Colours().eval()


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, list[str]]:
    """32 hold-out pictures and their names."""
    rows = load_data("emoji-noto", split="holdout", resolution=32)
    kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:32].tolist()
    return rows.images(kept), [rows.captions[i] for i in kept]


def plain(colour: Sequence[int], n: int = 1) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(n, 3, 4, 4).clone()


def test_cosines_are_exact_whatever_the_lengths_of_the_vectors(colours: Colours) -> None:
    images = torch.cat([plain((200, 0, 0)), plain((60, 80, 0)), plain((60, 80, 0)), plain((255, 255, 255))])
    captions = ["red", "red", "green", "not red"]
    got = pair_cosines(colours, images, captions)
    assert got.dtype == torch.float64
    assert torch.allclose(
        got, torch.tensor([1.0, 0.6, 0.8, -1 / math.sqrt(3)], dtype=torch.float64), atol=1e-6
    )


def test_swapped_captions_lower_the_score(lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs
    right = COSINE.of(pair_cosines(lite0, images, captions))
    wrong = [COSINE.of(pair_cosines(lite0, images, captions[k:] + captions[:k])) for k in (1, 7, 16)]
    assert right > max(wrong) + 0.1


def test_float_and_unscaled_pictures_are_refused(colours: Colours) -> None:
    images = plain((60, 80, 0), 2)
    for bad, message in (
        (images.float() / 255, "uint8"),
        (images.float(), "uint8"),
        (images // 80, "multiply by 255"),
        (images[:, 0], "uint8"),
        (images[:0], "no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_cosines(colours, bad, ["red"] * len(bad))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        colours.similarity(images.float(), ["red", "red"])
    for refuse in (pair_cosines, lambda s, x, c: s.similarity(x.float() / 255, c)):
        with pytest.raises(ValueError, match="2 pictures, but 3 captions"):
            refuse(colours, images, ["red"] * 3)


def test_uint8_and_float_pictures_score_the_same(lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs
    with torch.no_grad():
        by_float = lite0.similarity(images.float() / 255, captions)
    assert (pair_cosines(lite0, images, captions) - by_float).abs().max() < 1e-6


def test_batches_do_not_change_cosines(lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs[0][:9], pairs[1][:9]
    whole, split = (pair_cosines(lite0, images, captions, b) for b in (9, 2))
    assert (whole - split).abs().max() < 1e-5
    image_text._TEXTS.clear()
    short = lite0.encode_texts(captions, batch_size=2)
    image_text._TEXTS.clear()
    assert torch.allclose(short, lite0.encode_texts(captions), atol=1e-5)


def test_gradient_reaches_the_pictures_and_raises_the_cosine(
    lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]
) -> None:
    x = (pairs[0][:4].float() / 255).requires_grad_()
    captions = pairs[1][4:8]
    before = lite0.similarity(x, captions)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    step = (x + 0.1 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    with torch.no_grad():
        assert (lite0.similarity(step, captions) > before).all()
    assert not any(p.requires_grad for p in lite0.parameters())
    assert not lite0.encode_texts(captions).requires_grad


def test_a_scorer_stays_in_evaluation_mode_within_a_trained_module(colours: Colours) -> None:
    outer = nn.ModuleList([colours]).train()
    assert outer.training and not colours.training and not colours.drop.training
    images = plain((60, 80, 0), 50).float() / 255
    assert torch.allclose(colours.similarity(images, ["red"] * 50), torch.tensor(0.6), atol=1e-5)


def test_lite_minilm_stays_in_evaluation_mode(lite0: LiteMiniLM) -> None:
    before = lite0.encode_texts(["a red apple"])
    image_text._TEXTS.clear()
    lite0.train()
    assert torch.equal(lite0.encode_texts(["a red apple"]), before)


def test_texts_are_encoded_once_and_per_scorer(colours: Colours) -> None:
    first = colours.encode_texts(["red", "green", "red"])
    again = colours.encode_texts(["green", "not red", "red"])
    assert colours.asked == ["red", "green", "not red"]
    assert torch.equal(first[[1, 0]], again[[0, 2]]) and torch.equal(first[0], first[2])
    other = Colours()
    other.text_rule = "words, prefix"
    other.words = {"red": (0.0, 0.0, 1.0)}
    assert torch.equal(other.encode_texts(["red"])[0], torch.tensor([0.0, 0.0, 1.0]))


def test_cosines_that_are_not_finite_are_named(colours: Colours) -> None:
    colours.words = {"red": (1.0, 0.0, 0.0), "odd": (math.nan, 0.0, 0.0)}
    with pytest.raises(ValueError, match="colours: 1 cosines are not finite, first at index 2"):
        pair_cosines(colours, plain((60, 80, 0), 4), ["red", "red", "odd", "red"])


@pytest.mark.parametrize(
    ("cosines", "cosine", "clip_score", "hessel"),
    [
        ([0.5, 0.1], 0.3, 30.0, 0.75),
        ([0.5, -0.1], 0.2, 20.0, 0.625),
        ([-0.2, -0.4], -0.3, 0.0, 0.0),
        ([-0.5, 0.1], -0.2, 0.0, 0.125),
    ],
)
def test_where_negatives_are_cut_off_is_part_of_the_definition(
    cosines: list[float], cosine: float, clip_score: float, hessel: float
) -> None:
    values = torch.tensor(cosines, dtype=torch.float64)
    assert COSINE.of(values) == pytest.approx(cosine)
    assert CLIP_SCORE.of(values) == pytest.approx(clip_score)
    assert CLIP_SCORE_HESSEL.of(values) == pytest.approx(hessel)


def test_means_are_taken_in_float64() -> None:
    values = torch.cat([torch.full((1,), 1e6), torch.full((100_000,), 1e-3)])
    assert COSINE.of(values) == pytest.approx(float(np.mean(values.double().numpy())), rel=1e-12)


def test_protocols_tell_scorers_measures_and_captions_apart(colours: Colours, lite0: LiteMiniLM) -> None:
    def record(
        scorer: Scorer = colours, measure: Measure = COSINE, captions: Sequence[str] = ("red", "green")
    ):
        return image_text_protocol(scorer, measure, captions=captions, **SETTING)

    records = [
        record(),
        record(lite0),
        record(measure=CLIP_SCORE),
        record(measure=CLIP_SCORE_HESSEL),
        record(measure=replace(COSINE, clamp="mean")),
        record(measure=replace(COSINE, scale=100.0)),
        record(captions=("green", "red")),
        record(captions=("red",)),
    ]
    assert len({r.id for r in records}) == len(records)
    fields = asdict(records[1])
    assert fields["extractor"] == "lite0-minilm" and fields["dim"] == 384 and fields["n_gen"] == 2
    assert {k: fields[k] for k in lite0.identity} == lite0.identity
    assert COSINE.label(lite0) == "image-text cosine lite0-minilm"


@pytest.mark.parametrize(
    "choice",
    [
        'torch.set_float32_matmul_precision("medium")',
        'torch.backends.fp32_precision = "tf32"',
    ],
)
def test_exact_products_are_switched_on_and_back(choice: str) -> None:
    """Whichever of torch's ways the caller chose them by; in a process of its own, since not all can be undone."""
    program = f"""
import torch
from fewstep.distill.scorers.image_text import full_float32
parts = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
{choice}
before = [p.fp32_precision for p in parts]
assert "tf32" in before
try:
    with torch.autocast("cpu"), full_float32(torch.device("cpu")):
        assert [p.fp32_precision for p in parts] == ["ieee"] * 4
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        raise RuntimeError("inside")
except RuntimeError as error:
    assert str(error) == "inside"
assert [p.fp32_precision for p in parts] == before
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_autocast_around_a_score_changes_nothing(lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs[0][:4], pairs[1][:4]
    expected = pair_cosines(lite0, images, captions)
    image_text._TEXTS.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pair_cosines(lite0, images, captions), expected)


def test_normalisation_belongs_to_the_vectors(lite0: LiteMiniLM, pairs: tuple[Tensor, list[str]]) -> None:
    images, captions = pairs[0][:4], pairs[1][:4]
    with torch.no_grad():
        a, b = lite0.encode_images(images.float() / 255), lite0.encode_texts(captions)
    assert torch.allclose(a.norm(dim=1), torch.ones(4)) and torch.allclose(b.norm(dim=1), torch.ones(4))
    raw = lite0.text_vectors(captions)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    assert torch.allclose(F.normalize(raw, dim=1), b, atol=1e-6)
