"""Memorising is seen by the distance ratio; captions are matched against one fixed other."""

import pytest
import torch
from fewstep.distill.metrics.neighbours import (
    Share,
    match_share,
    nearest_distance,
    neighbour_ratio,
    unseen_distance,
)
from scipy.stats import beta


def test_nearest_distance_on_a_line_in_blocks() -> None:
    x, y = torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([[1.0], [6.5], [20.0]])
    for block in (1, 2, 10):
        assert nearest_distance(x, y, block=block).tolist() == [1.0, 1.5, 2.5]


def test_ratio_tells_copies_from_new_pictures() -> None:
    train, holdout, fresh = (torch.randn(200, 8) for _ in range(3))
    unseen = unseen_distance(holdout, train)
    assert unseen == nearest_distance(holdout, train).median()
    assert neighbour_ratio(train[:50], train, unseen) == 0
    assert neighbour_ratio(train + 1e-3, train, unseen) < 0.01
    assert neighbour_ratio(fresh, train, unseen) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="hold-out pictures are training pictures"):
        unseen_distance(train, train)


def test_nearest_style_of_a_caption_counts() -> None:
    reference = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    captions = ["a", "b", "a", "b"]
    assert match_share(torch.tensor([[0.1, 0.2, 5.0]]), ["a"], reference, captions).value == 1
    assert match_share(torch.tensor([[0.1, 5.0, 0.2]]), ["a"], reference, captions).value == 0
    assert match_share(torch.tensor([[0.1, 5.0, 0.2]]), ["b"], reference, captions).value == 1


def test_distance_is_of_angles_and_a_tie_is_a_miss() -> None:
    reference, captions = torch.tensor([[10.0, 0.0], [0.5, 0.5]]), ["far", "near"]
    assert match_share(torch.tensor([[1.0, 0.1]]), ["far"], reference, captions).value == 1
    assert match_share(torch.ones(1, 2), ["far"], torch.ones(2, 2), captions).value == 0


def test_own_pictures_match_wholly_and_random_ones_by_half() -> None:
    n = 300
    reference = torch.randn(2 * n, 16)
    captions = [f"c{i}" for i in range(n)] * 2
    assert match_share(reference, captions, reference, captions) == Share(n, n)
    share = match_share(torch.randn(n, 16), captions[:n], reference, captions)
    assert share.trials == n and share.interval[0] < 0.5 < share.interval[1]


def test_the_other_caption_does_not_depend_on_how_many_are_asked() -> None:
    n = 40
    reference, captions = torch.randn(n, 6), [f"c{i}" for i in range(n)]
    pictures = torch.randn(n, 6)
    each = [match_share(pictures[i : i + 1], captions[i : i + 1], reference, captions).hits for i in range(n)]
    assert sum(each) == match_share(pictures, captions, reference, captions).hits
    assert 0 < sum(each) < n


def test_a_caption_counts_once_by_its_first_picture() -> None:
    reference, captions = torch.eye(3), ["a", "b", "c"]
    pictures = torch.stack([reference[0], -reference[0], -reference[0]])
    assert match_share(pictures, ["a", "a", "a"], reference, captions) == Share(1, 1)
    assert match_share(pictures.flip(0), ["a", "a", "a"], reference, captions) == Share(0, 1)


def test_interval_is_clopper_pearson() -> None:
    expected = (beta.ppf(0.025, 60, 41), beta.ppf(0.975, 61, 40))
    assert Share(60, 100).interval == pytest.approx(expected, abs=1e-9)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="'z'"):
        match_share(torch.ones(1, 2), ["z"], torch.eye(2), ["a", "b"])
    with pytest.raises(ValueError, match="2 different captions"):
        match_share(torch.ones(1, 2), ["a"], torch.eye(2), ["a", "a"])
