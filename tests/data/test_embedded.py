"""The embedded emoji: counts, splits, the layout of the sheets."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from fewstep.distill.data import embedded
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image

SIZES = {"train": 998, "reward": 248, "score": 162, "holdout": 228}
GENDERED = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "boys", "girls"}


@pytest.mark.parametrize("split", SIZES)
def test_split_sizes(split):
    noto = load_data("emoji-noto", split=split, resolution=32)
    both = load_data("emoji", split=split, resolution=32)
    assert (len(noto), len(both)) == (SIZES[split], 2 * SIZES[split])
    assert both.captions == noto.captions * 2
    assert [r["style"] for r in both.rows] == ["noto"] * len(noto) + ["twemoji"] * len(noto)
    assert torch.equal(both.images(range(len(noto))), noto.images())
    twemoji = load_data("emoji-twemoji", split=split, resolution=32)
    assert torch.equal(both.images(range(len(noto), len(both))), twemoji.images())
    assert not torch.equal(noto.images(), twemoji.images())


def test_1636_names_each_once():
    captions = list(
        itertools.chain(*(load_data("emoji-noto", split=s, resolution=32).captions for s in SIZES))
    )
    assert len(captions) == 1636 and len(set(captions)) >= 1635
    categories = {e["category"] for e in embedded.entries()}
    assert len(categories) == 8 and not categories & {"Flags", "Component"}


def test_variants_of_a_name_stay_on_one_side():
    sides: dict[str, set[str]] = defaultdict(set)
    members: Counter[str] = Counter()
    for entry in embedded.entries():
        words = [w for w in entry["caption"].split() if w not in GENDERED]
        group = "clock" if entry["caption"].startswith("clock face") else " ".join(words)
        sides[group].add(entry["split"])
        members[group] += 1
    assert members["clock"] == 24 and sum(n > 1 for n in members.values()) > 80
    assert {group: s for group, s in sides.items() if len(s) > 1} == {}


def test_cells_are_cut_from_the_sheet_in_row_major_order():
    data = load_data("emoji-noto", split="train", resolution=32)
    row = data.captions.index("red apple")
    place = [e["caption"] for e in embedded.entries()].index("red apple")
    left, top = 32 * (place % 40), 32 * (place // 40)
    sheet = Image.open(embedded.FOLDER / "noto.png").convert("RGB")
    cell = np.array(sheet.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(data.images([row])[0].permute(1, 2, 0).numpy(), cell)
    red, green, blue = data.images([row])[0, :, 16, 16].tolist()
    assert red > 150 > max(green, blue)
    assert data.images([row])[0, :, 0, 0].tolist() == [255, 255, 255]


def test_pixels_have_the_statistics_of_the_source():
    splits = [load_data("emoji-noto", split=s, resolution=32).images() for s in SIZES]
    pixels = torch.cat(splits).float()
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((195, 77), abs=6)


def test_other_resolutions_are_resized_from_32():
    small, large = (load_data("emoji-noto", split="score", resolution=r) for r in (32, 64))
    assert large.images([3]).shape == (1, 3, 64, 64) and large.images([3]).dtype == torch.uint8
    cell = Image.fromarray(small.images([3])[0].permute(1, 2, 0).numpy())
    expected = np.array(cell.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(large.images([3])[0].permute(1, 2, 0).numpy(), expected)
    assert small.fingerprint != large.fingerprint


def test_returned_images_are_the_callers():
    data = load_data("emoji-noto", split="score", resolution=32)
    first = data.images()
    data.images().zero_()
    assert torch.equal(data.images(), first) and first.any()


def test_captions_may_be_categories_or_nothing():
    data = load_data("emoji-noto", split="score", resolution=32, caption_column="category")
    assert data.captions == [r["category"] for r in data.rows]
    assert set(load_data("emoji", resolution=32, caption_column=None).captions) == {""}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, ["'test'", "train, reward, score, holdout"]),
        ({"caption_column": "caption_en"}, ["'caption_en'", "text, category, subcategory"]),
        ({"image_column": "picture"}, ["'picture'", "set image_column to image"]),
        ({"resolution": 0}, ["resolution", "0"]),
    ],
)
def test_bad_settings_name_the_choices(arguments, words):
    with pytest.raises(UserError) as caught:
        load_data("emoji", **{"resolution": 32, **arguments})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
