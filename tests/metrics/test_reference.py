"""What does not depend on a model is computed once: for the seeds, the steps and the next call."""

from pathlib import Path

import pytest
import torch
from fewstep.distill.metrics import reference
from fewstep.distill.metrics.kid import kid, within
from fewstep.distill.metrics.manifold import radii
from fewstep.distill.metrics.neighbours import unseen_distance
from fewstep.distill.metrics.reference import Reference
from fewstep.distill.reports.evaluate import evaluate


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def made(count: int = 40) -> Reference:
    return Reference("data/train", "ab", [""] * count, torch.randn(count, 6))


def test_numbers_of_real_pictures_are_kept_under_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    train, unseen, generated = made(), made(30), torch.randn(20, 6) + 1
    expected = within(train.features), unseen_distance(unseen.features, train.features)
    calls: list[int] = []
    monkeypatch.setattr(reference, "within", lambda x: calls.append(len(x)) or within(x))
    monkeypatch.setattr(
        reference, "unseen_distance", lambda *x: calls.append(len(x[0])) or unseen_distance(*x)
    )
    for again in (train, Reference("other name", "cd", train.captions, train.features.clone())):
        assert (again.within, again.distance_of(unseen)) == pytest.approx(expected, rel=1e-15)
    assert calls == [40, 30]
    assert train.kid(generated, within(generated)) == pytest.approx(kid(train.features, generated), rel=1e-12)
    changed = Reference(train.name, train.sha256, train.captions, train.features * 1.5)
    assert changed.within == within(changed.features) != expected[0]
    assert changed.distance_of(unseen) != train.distance_of(unseen) != unseen.distance_of(train)


def test_the_first_pictures_are_a_reference_of_their_own() -> None:
    train = made()
    first = train.head(12)
    assert first is train.head(12) and first.name == "data/train, first 12" and first.sha256 == train.sha256
    assert torch.equal(first.reach, radii(train.features[:12], (3, 5)))
    assert not torch.equal(first.reach, train.head(20).reach[:, :12])
    assert first.within == within(train.features[:12]) != train.within


def test_real_pictures_are_read_once_for_all_steps(
    tiny_pipeline: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, hashed = reference.hash_pictures, []
    monkeypatch.setattr(reference, "hash_pictures", lambda *x: hashed.append(x[1][0]) or plain(*x))
    how = {"data": str(data_folder), "num_images": 6, "device": "cpu", "progress": False}
    both = evaluate(str(tiny_pipeline), steps=[1, 2], **how)
    assert hashed == [12, 6]
    alone = evaluate(str(tiny_pipeline), steps=[2], **how)
    assert alone["rows"][0]["scores"] == both["rows"][1]["scores"]
