"""The numbers that searches maximise."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fewstep.distill.config.search import FitnessSettings, SearchDataSettings
from fewstep.distill.config.validation import validate
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.kid import kid
from fewstep.distill.metrics.manifold import radii
from fewstep.distill.metrics.reference import reference
from fewstep.distill.scorers.by_name import make_scorer
from fewstep.distill.scorers.image_text import pair_cosines
from fewstep.distill.search import fitness as module
from fewstep.distill.search.fitness import Fitness, balance, realism
from torch import Tensor

DATA = SearchDataSettings(name="emoji-noto", split="score")


def build(**settings: Any) -> Fitness:
    return Fitness(validate(FitnessSettings, settings), DATA, torch.device("cpu"), 16)


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[str]]:
    images, captions = reference("emoji-noto", "holdout", 32)
    return images[:16], captions[:16]


def test_realism_by_loops() -> None:
    generated, real = torch.randn(7, 5), torch.randn(12, 5)
    reach = radii(real, [3])[0]
    middle = sorted(reach.tolist())[5]  # the lower median of 12
    expected = [
        max(
            float(r / (g.double() - x.double()).norm())
            for x, r in zip(real, reach, strict=True)
            if r <= middle
        )
        for g in generated
    ]
    torch.testing.assert_close(realism(generated, real, reach).tolist(), expected)


def test_realism_is_above_one_inside_of_a_ball_and_finite_at_its_centre() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [50.0]])
    reach = radii(real, [1])[0]
    near, far, same = realism(torch.tensor([[0.5], [9.0], [2.0]]), real, reach)
    assert near == 2 and far == pytest.approx(1 / 6) and same.isfinite() and same > 1e6


def test_jaq_is_the_sum_of_its_terms(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    out = build(weight=3.0)(images, captions)
    scorer, measure = make_scorer("lite0-minilm")
    assert out["text"] == measure.of(pair_cosines(scorer, images, captions))
    assert out["fitness"] == out["text"] + 3.0 * out["quality"]
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    worse = build(weight=3.0)(noise, captions)
    assert worse["quality"] < out["quality"] and worse["text"] < out["text"]


def test_realism_is_the_mean_over_pictures_to_the_split_of_the_search(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    f = build(neighbours=2)
    network = f.judge.network
    own, _ = reference("emoji-noto", "score", 32)
    features = module.extract(network, own, 16)
    expected = realism(module.extract(network, images, 16), features, radii(features, [2])[0]).mean()
    assert f(images, captions)["quality"] == pytest.approx(float(expected))


def test_any_scorer_may_be_either_term(
    real: tuple[Tensor, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, captions = real
    out = build(quality="lite0-minilm", weight=0.5)(images, captions)
    assert out["quality"] == out["text"] and out["fitness"] == 1.5 * out["text"]


def test_the_logarithm_of_the_text_term(real: tuple[Tensor, list[str]]) -> None:
    f = build(log_text=True)
    f.text, f.quality = (lambda *_: 30.0), (lambda *_: 0.5)
    assert f(*real)["fitness"] == math.log(30) + 1.0
    f.text = lambda *_: -0.1
    assert math.isnan(f(*real)["fitness"])


def test_the_best_by_jaq_need_not_be_the_best_by_its_text_term(real: tuple[Tensor, list[str]]) -> None:
    f, best = build(), {}
    for name, text, quality in (("text", 0.9, 0.1), ("both", 0.7, 0.6), ("quality", 0.1, 0.7)):
        f.text, f.quality = (lambda *_, v=text: v), (lambda *_, v=quality: v)
        best[name] = f(*real)["fitness"]
    assert max(best, key=lambda k: best[k]) == "both"


def test_kid_is_the_smaller_the_better(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    f = build(kind="kid")
    own, _ = reference("emoji-noto", "score", 32)
    network = f.judge.network
    expected = kid(module.extract(network, own, 16), module.extract(network, images, 16))
    out = f(images, captions)
    assert out == {"kid": pytest.approx(expected, abs=1e-9), "fitness": -out["kid"]}
    assert f(torch.randint(0, 256, images.shape, dtype=torch.uint8), [])["fitness"] < out["fitness"]


def test_jaq_without_captions(real: tuple[Tensor, list[str]]) -> None:
    captions: Sequence[str] = []
    with pytest.raises(UserError, match=r"fitness\.kind: jaq needs captions"):
        build()(real[0], captions)


def test_balance() -> None:
    """sd of the text term, and of the quality term times its weight, over candidates with a value."""
    settings = validate(FitnessSettings, {"weight": 3.0})
    rows = [{"fitness": 1.0, "text": 0.0, "quality": 1.0}, {"fitness": 1.0, "text": 4.0, "quality": 2.0}]
    rows.append({"fitness": None, "text": None, "quality": 9.0})
    assert balance(settings, rows) == {"text": 2.0, "quality": 1.5}
    assert balance(validate(FitnessSettings, {"kind": "kid"}), rows) == {}
