"""Webdataset shards: whole or refused, and what their samples may lack."""

import io
import json
import tarfile

import pytest
import webdataset
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image

COLOURS = ((200, 10, 10), (10, 180, 10), (10, 10, 220), (0, 0, 0))


def encoded(colour, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, kind)
    return out.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(count=4):
    return [
        m for i in range(count) for m in ((f"{i:03}.png", encoded(COLOURS[i])), (f"{i:03}.txt", b"%d" % i))
    ]


def load(path, **options):
    return load_data(str(path), resolution=8, **options)


def colours(data):
    return [tuple(image[:, 4, 4].tolist()) for image in data.images()]


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_read_as_webdataset_writes_them(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i, colour in enumerate(COLOURS):
            image = Image.new("RGB", (8, 8), colour)
            sink.write({"__key__": f"part/{i}", "png": image, "txt": f"é {i}", "json": {"title": str(i)}})
    data = load(tmp_path / "a.tar")
    assert data.captions == [f"é {i}" for i in range(4)] and colours(data) == list(COLOURS)
    assert load(tmp_path, caption_column="title").captions == ["0", "1", "2", "3"]
    assert "title" in refusal(tmp_path, caption_column="name")


def test_a_shard_cut_anywhere_is_refused_with_its_whole_samples(tmp_path):
    whole = write(tmp_path / "whole.tar", samples()).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar]
    for size in range(100, ends[-1] + 512, 100):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        message = refusal(tmp_path / "cut.tar")
        assert message.startswith(f"{tmp_path / 'cut.tar'}: is ")
        if size > 512:
            told = int(message.partition("behind ")[2].split()[0])
            assert told <= sum(end <= size for end in ends[1::2]) <= told + 1, (size, message)
    (tmp_path / "cut.tar").write_bytes(whole[: ends[-1] + 512])
    assert len(load(tmp_path / "cut.tar")) == 4  # one block of zeros ends an archive


def test_damaged_and_joined_shards_are_refused(tmp_path):
    whole = write(tmp_path / "whole.tar", samples()).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[4].offset
    bad = tmp_path / "bad.tar"
    bad.write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    assert "bad.tar: is damaged behind 2 whole samples" in refusal(bad)
    bad.write_bytes(whole + whole)
    assert "goes on after its end mark" in refusal(bad)
    bad.write_bytes(b"")
    assert "is no whole tar file" in refusal(bad)
    write(bad, [*samples(), samples()[0]])
    assert "000.png is there twice" in refusal(bad)
    write(bad, [])
    assert "no rows" in refusal(bad)


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_sample_without_text_counts_wherever_it_stands(tmp_path, missing):
    write(tmp_path / "a.tar", [m for m in samples() if m[0] != f"{missing:03}.txt"])
    data = load(tmp_path / "a.tar")
    assert data.captions == ["" if i == missing else str(i) for i in range(4)]
    assert data.uncaptioned == [missing] and data.called(missing).endswith(f"a.tar: {missing:03}.png")


def test_members_of_a_sample_may_stand_apart_and_differ_in_format(tmp_path):
    members = [(f"{i}.{e}", encoded(c, k)) for i, (c, e, k) in enumerate(zip(
        COLOURS, ("png", "JPG", "bmp", "webp"), ("PNG", "JPEG", "BMP", "WEBP"), strict=True))]  # fmt: skip
    texts = [(f"{i}.txt", f"\ufeff{i}\n".encode()) for i in range(4)]
    hidden = [("._0.png", b"of another system"), ("folder/.txt", b"")]
    data = load(write(tmp_path / "a.tar", [*members, *hidden, *texts]))
    assert data.captions == ["0", "1", "2", "3"]
    for seen, colour in zip(colours(data), COLOURS, strict=True):
        assert max(abs(a - b) for a, b in zip(seen, colour, strict=True)) < 6


def test_samples_of_several_pictures_or_none(tmp_path):
    masks = [(f"{i:03}.mask.png", encoded("white")) for i in range(4)]
    shard = write(tmp_path / "a.tar", [*samples(), *masks])
    assert "000 has 2 pictures: set image_column to one of mask.png, png" in refusal(shard)
    assert colours(load(shard, image_column="png")) == list(COLOURS)
    assert colours(load(shard, image_column="mask.png")) == [(255,) * 3] * 4
    assert "000 has no picture .jpg" in refusal(shard, image_column="jpg")
    write(shard, [*samples(), ("004.txt", b"4")])
    assert "a.tar: 004 has no picture: " in refusal(shard)
    write(shard, [*samples(), ("004.heic", b"\0"), ("004.txt", b"4")])
    assert "004 has no picture, and .heic is not read" in refusal(shard)


def test_text_that_cannot_be_read_names_shard_and_member(tmp_path):
    picture = ("0.png", encoded("red"))
    assert "a.tar: 0.txt is not UTF-8" in refusal(write(tmp_path / "a.tar", [picture, ("0.txt", b"\xff")]))
    bad = write(tmp_path / "b.tar", [picture, ("0.json", b'{"a": ')])
    assert "b.tar: 0.json: is not JSON" in refusal(bad, caption_column="a")
    number = write(tmp_path / "c.tar", [picture, ("0.json", json.dumps({"a": 7}).encode())])
    assert "7 (int)" in refusal(number, caption_column="a")
