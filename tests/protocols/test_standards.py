"""Rules of the named protocols against second implementations, and what their records say."""

import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.metrics.inception import RESIZES
from fewstep.distill.protocols.archives import (
    Crop,
    all_pictures,
    batches,
    cifar10_pictures,
    npz_pictures,
    zip_pictures,
)
from fewstep.distill.protocols.published_numbers import CHECKS
from fewstep.distill.protocols.standards import (
    PROMPT_RULES,
    QUANTISATIONS,
    caption_lines,
    coco_captions,
    mjhq_names,
    mjhq_prompts,
)
from fewstep.distill.protocols.table import STANDARDS, get_standard
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor


def test_crop_is_torchvisions_centre_crop_then_pillows_lanczos() -> None:
    for height, width in ((37, 64), (64, 37), (40, 40), (300, 301)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        expected = []
        for picture in images:
            square = center_crop(Image.fromarray(picture.permute(1, 2, 0).numpy()), min(height, width))
            expected.append(pil_to_tensor(square.resize((48, 48), Image.Resampling.LANCZOS)))
        assert torch.equal(Crop(square=True, side=48)(images), torch.stack(expected))
    assert Crop()(images) is images
    assert Crop(square=True)(images).shape[-2:] == (300, 300)
    with pytest.raises(ValueError, match="uint8"):
        Crop()(images.float())


def test_the_protocols_crop_where_their_sources_do() -> None:
    images = torch.randint(0, 256, (1, 3, 300, 320), dtype=torch.uint8)
    assert get_standard("coco2014-30k").crop.value(images).shape == (1, 3, 256, 256)
    assert get_standard("cifar10-50k").crop.value(images) is images


def test_quantisations_are_half_a_level_apart() -> None:
    levels = torch.arange(0.125, 255, 0.25, dtype=torch.float64)
    x = levels / 127.5 - 1
    rounded, cut = (QUANTISATIONS[rule](x) for rule in ("round", "truncate"))
    assert torch.equal(rounded, torch.floor(levels + 0.5).byte())
    whole = x[(levels % 1) == 0.125]
    assert torch.equal(QUANTISATIONS["truncate"](whole), torch.arange(255).byte())
    assert (rounded.double() - cut.double()).mean() == pytest.approx(0.5, abs=0.01)
    ends = torch.tensor([-2.0, 2.0])
    assert all(rule(ends).tolist() == [0, 255] for rule in QUANTISATIONS.values())


def test_captions_are_the_lines_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("a cat \n  two dogs\n\nthe end\n")
    assert caption_lines(path, 4) == ["a cat ", "  two dogs", "", "the end"]
    with pytest.raises(UserError, match="4 prompts, 5 are needed"):
        caption_lines(path, 5)


def test_mjhq_selection_is_the_shuffle_with_seed_0_then_sorted(tmp_path: Path) -> None:
    """random.Random(0).shuffle of ten items in order gives 7 8 1 5 3 4 2 0 9 6 in every Python 3."""
    order = list(range(10))
    random.Random(0).shuffle(order)
    assert order == [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]
    path = tmp_path / "meta_data.json"
    names = "jihgfedcba"
    path.write_text(json.dumps({name: {"prompt": f"of {name}", "category": "x"} for name in names}))
    assert mjhq_names(path, 4) == sorted(names[i] for i in (7, 8, 1, 5)) == ["b", "c", "e", "i"]
    assert mjhq_prompts(path, 4) == ["of b", "of c", "of e", "of i"]
    with pytest.raises(UserError, match="10 prompts, 11 are needed"):
        mjhq_names(path, 11)
    for text in ("{", "[]", '{"a": {}}', '{"a": {"prompt": 1}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"meta_data\.json: .*: give --prompts PATH"):
            mjhq_names(path, 1)


def test_coco_takes_the_first_caption_of_each_image_by_id(tmp_path: Path) -> None:
    rows = [(30, 2, "b2"), (10, 9, "late"), (10, 4, "first"), (30, 1, "b1"), (20, 7, "only")]
    listed = [{"image_id": i, "id": k, "caption": c} for i, k, c in rows]
    path = tmp_path / "annotations.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations/captions_val2017.json", json.dumps({"annotations": listed}))
    assert coco_captions(path, 3) == ["first", "only", "b1"]
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not COCO's 2017 annotations"):
        coco_captions(path, 1)


def test_every_protocol_is_whole_and_says_what_is_not_established() -> None:
    assert set(STANDARDS) == {
        "cifar10-50k", "imagenet64-50k", "imagenet256-50k", "coco2014-30k", "coco2017-5k", "mjhq-5k",
    }  # fmt: skip
    for name, standard in STANDARDS.items():
        assert standard.name == name
        assert standard.quantisation.value in QUANTISATIONS
        rule = standard.extractor.value.removeprefix("inception").removeprefix("-") or "tf1"
        assert rule in RESIZES
        assert (standard.keys is None) == (standard.members is not None)
        assert (standard.prompts is None) == (standard.prompts_rule is None)
        assert standard.prompts_rule is None or standard.prompts_rule.value in PROMPT_RULES
        for file in standard.files:
            assert file.address is None or file.address.rsplit("/", 1)[-1] == file.name
        assert all(stated.source for stated in standard.stated().values())
        record = json.loads(json.dumps(standard.record()))
        unsettled = {k for k, v in record.items() if isinstance(v, dict) and not v["established"]}
        assert len(unsettled) == len(record["not_established"])
        assert all(any(s.startswith(f"{k}: ") for s in record["not_established"]) for k in unsettled)
    assert get_standard("cifar10-50k").not_established == []
    said = get_standard("coco2017-5k").not_established
    assert any(s.startswith("crop: centre crop to square, Lanczos to 256 px") for s in said)
    with pytest.raises(UserError, match="no 'cifar'; available: cifar10-50k"):
        get_standard("cifar")


def test_a_run_with_other_numbers_is_not_the_protocol() -> None:
    standard = get_standard("cifar10-50k")
    standard.check(50_000, 32)
    with pytest.raises(UserError, match="num_images: 5000, but protocol cifar10-50k has 50000"):
        standard.check(5_000, 32)
    with pytest.raises(UserError, match="image_size: 64, but protocol cifar10-50k has 32"):
        standard.check(50_000, 64)
    get_standard("mjhq-5k").check(5_000, 512)


def test_checks_name_extractors_and_both_sides() -> None:
    assert sum(check.published for check in CHECKS.values()) == 3
    for name, check in CHECKS.items():
        assert check.name == name and check.tolerance > 0 and check.source
        assert all(extractor.split("-")[0] == "inception" for extractor in check.values)
    assert len(CHECKS["cifar10-5k"].files) == 1 and len(CHECKS["cleanfid-folders"].files) == 2


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def png(picture: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out, "png")
    return out.getvalue()


def test_zip_and_folder_give_the_chosen_pictures_in_order(tmp_path: Path) -> None:
    images = pictures(3)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, picture in zip(("val/2.png", "val/1.png", "other/3.png"), images, strict=True):
            archive.writestr(name, png(picture))
        archive.writestr("__MACOSX/val/._1.png", b"junk")
        archive.writestr("val/readme.txt", b"text")
        archive.extractall(tmp_path / "folder")
    for place in (path, tmp_path / "folder"):
        got = list(zip_pictures(place, all_pictures("val/*"), Crop()))
        assert torch.equal(torch.stack(got), images[[1, 0]])
        assert len(list(zip_pictures(place, all_pictures(), Crop(side=8)))) == 3
        with pytest.raises(UserError, match="none of the pictures that are wanted, among 3"):
            list(zip_pictures(place, all_pictures("train/*"), Crop()))
        with pytest.raises(UserError, match="lacks 1 of 2 pictures, such as gone"):
            list(zip_pictures(place, lambda names: [names[0], "gone.png"], Crop()))
    (tmp_path / "text.zip").write_bytes(b"text")
    with pytest.raises(UserError, match="neither a folder of pictures nor a zip"):
        list(zip_pictures(tmp_path / "text.zip", all_pictures(), Crop()))


def test_npz_pictures_are_read_one_by_one(tmp_path: Path) -> None:
    images = pictures(4)
    np.savez(tmp_path / "a.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=np.zeros(4))
    assert torch.equal(torch.stack(list(npz_pictures(tmp_path / "a.npz"))), images)
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 8, 8, 3)))
    with pytest.raises(UserError, match=r"arr_0 is float64 \(2, 8, 8, 3\), not uint8"):
        list(npz_pictures(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="no pictures arr_0"):
        list(npz_pictures(tmp_path / "c.npz"))


def test_cifar10_pictures_are_the_first_of_their_split(tmp_path: Path) -> None:
    images = pictures(12)
    path = tmp_path / "cifar.tar.gz"
    rows = images.reshape(12, -1).numpy()
    parts = {f"data_batch_{i + 1}": rows[2 * i : 2 * i + 2] for i in range(5)} | {"test_batch": rows[10:]}
    with tarfile.open(path, "w:gz") as archive:
        for name, data in parts.items():
            body = pickle.dumps({b"data": data})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    assert torch.equal(torch.stack(list(cifar10_pictures(path, "train", 5))), images[:5])
    assert torch.equal(torch.stack(list(cifar10_pictures(path, "test", 2))), images[10:])
    with pytest.raises(UserError, match="train has 10 pictures, not 11"):
        list(cifar10_pictures(path, "train", 11))
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="not the CIFAR-10 archive"):
        list(cifar10_pictures(path, "train", 1))


def test_batches_hold_one_shape_each_in_order() -> None:
    sizes = (8, 8, 8, 9, 9, 8)
    listed = [torch.full((3, s, s), i, dtype=torch.uint8) for i, s in enumerate(sizes)]
    got = list(batches(listed, 2))
    assert [tuple(b.shape[:1]) + tuple(b.shape[2:3]) for b in got] == [(2, 8), (1, 8), (2, 9), (1, 8)]
    assert [int(p[0, 0, 0]) for b in got for p in b] == list(range(6))
