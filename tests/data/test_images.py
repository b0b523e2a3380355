"""Reading, cutting, resizing and flattening of pictures, and the fingerprint."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from fewstep.distill.data.images import MemoryImages, over_white, read_picture, to_square
from fewstep.distill.data.sources import load_data
from fewstep.distill.errors import UserError
from PIL import Image


def picture(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (96, 48), (16, 16), (30, 90)])
def test_resizing_agrees_with_torchvision(height, width):
    image = picture(height, width)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    side = min(height, width)
    square = TF.center_crop(pixels, [side, side])
    expected = TF.resize(square, [32, 32], TF.InterpolationMode.BICUBIC, antialias=True)
    ours = torch.from_numpy(np.array(to_square(image, 32, True))).permute(2, 0, 1)
    assert (ours.int() - expected.int()).abs().max() <= 2  # both round to 8 bits after each axis


def test_without_the_crop_the_whole_picture_is_kept():
    image = Image.new("RGB", (40, 20), "white")
    image.paste((0, 0, 0), (0, 0, 10, 20))
    cropped, squeezed = (np.array(to_square(image, 20, c))[:, :, 0] for c in (True, False))
    assert (cropped > 250).all()
    assert (squeezed[:, :4] < 5).all() and (squeezed[:, 7:] > 250).all()


def test_transparency_becomes_white():
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 51))
    assert np.array(over_white(half))[0, 0].tolist() == [204, 204, 204]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 0, 0, 200])
    palette.info["transparency"] = 0
    palette.putpixel((1, 0), 1)
    assert np.array(over_white(palette))[0, :2].tolist() == [[255, 255, 255], [0, 0, 200]]


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("L", (2, 2), 77), 77),
        (Image.fromarray(np.full((2, 2), 77 * 256 + 5, np.uint16)), 77),
        (Image.new("LA", (2, 2), (77, 255)), 77),
        (Image.new("1", (2, 2), 1), 255),
    ],
)
def test_grey_pictures(image, grey):
    assert np.array(over_white(image)).tolist() == [[[grey] * 3] * 2] * 2


def read(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return np.array(read_picture(file, "a picture"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bits_are_divided_by_257(kind):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    seen = read(Image.fromarray(values), kind, **options)
    assert (seen == (values // 257)[:, :, None]).all() and seen.shape == (16, 16, 3)
    between = read(Image.fromarray(values.clip(0, 65000) + 128), kind, **options)
    assert (between == np.round((values.clip(0, 65000) + 128) / 257)[:, :, None]).all()


def test_sixteen_bits_of_a_grey_map():
    seen = read_picture(io.BytesIO(b"P5 2 1 65535\n\x4d\x4d\xff\xff"), "a picture")
    assert np.array(seen)[0].tolist() == [[77] * 3, [255] * 3]


def test_transparent_value_of_sixteen_bits_is_white():
    values = np.array([[77 * 257, 1000]], np.uint16)
    assert read(Image.fromarray(values), transparency=1000)[0].tolist() == [[77] * 3, [255] * 3]


def test_rotation_flag_of_sixteen_bits_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 0], [65535, 65535]], np.uint16)
    assert read(Image.fromarray(values), exif=exif)[:, :, 0].tolist() == [[255, 0]] * 2


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), 255),
        (Image.new("L", (2, 2), 0), 0),
        (Image.new("L", (2, 2), 2), 2),
        (Image.new("LA", (2, 2), (0, 51)), 204),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 178)), 77),
    ],
)
def test_pixel_types_that_span_their_range(image, expected):
    kind = "TIFF" if image.mode == "CMYK" else "PNG"
    assert read(image, kind).tolist() == [[[expected] * 3] * 2] * 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.eye(4, dtype=np.uint8)), "only 0 and 1"),
        (Image.fromarray(np.ones((4, 4, 3), np.uint8)), "only 0 and 1"),
        (Image.fromarray(np.eye(4, dtype=np.uint16)), "16-bit pixels that end at 1 "),
        (Image.fromarray(np.full((4, 4), 200, np.uint16)), "16-bit pixels that end at 200 "),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "floating point"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "32-bit integer"),
    ],
)
def test_pixels_whose_range_is_not_known_are_refused(image, words):
    with pytest.raises(UserError, match=words) as caught:
        read(image, "TIFF")
    assert str(caught.value).startswith("a picture: cannot be read as an image (")


def test_whatever_a_decoder_raises_is_one_line(monkeypatch):
    def broken(*_):
        raise IndexError("far\nout")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(UserError, match=r"^a picture: cannot be read as an image \(far out\)"):
        read(Image.new("RGB", (2, 2), "red"))


def test_rotation_flag_of_cameras_is_followed(tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_data(str(tmp_path), resolution=16).images()[0, 0]
    assert (pixels[:, 8:] == 255).all() and (pixels[:, :8] == 0).all()


def memory(pixels, captions=("a", "b"), resolution=8, center_crop=True):
    rows = [{} for _ in captions]
    return MemoryImages(pixels, list(captions), rows, resolution=resolution, center_crop=center_crop)


def test_fingerprint_follows_every_part():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    changed = pixels.clone()
    changed[1, 2, 7, 7] ^= 1
    variants = [
        memory(pixels),
        memory(changed),
        memory(pixels.flip(0)),
        memory(pixels, ["a", "c"]),
        memory(pixels, resolution=16),
        memory(pixels, center_crop=False),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert memory(pixels.clone()).fingerprint == variants[0].fingerprint


def test_fingerprint_of_a_folder_is_of_its_content(tmp_path):
    def write(folder, place=None):
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
        if place is not None:
            pixels[place, place] ^= 1
        Image.fromarray(pixels).save(folder / "a.bmp")
        Image.new("RGB", (8, 8), "red").save(folder / "b.png")
        lines = [{"file_name": n, "text": n} for n in ("a.bmp", "b.png")]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return load_data(str(folder), resolution=8).fingerprint

    first = write(tmp_path / "one")
    assert write(tmp_path / "copy") == first
    changed = {write(tmp_path / f"pixel {place}", place) for place in (0, 75, 149)}
    assert len(changed | {first}) == 4
    load = f"load_data({str(tmp_path / 'one')!r}, resolution=8)"
    code = f"from fewstep.distill.data.sources import load_data; print({load}.fingerprint)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == first


def test_one_byte_anywhere_is_another_fingerprint(tmp_path):
    """Of a large file too, edited in place, with its size and time as before."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    path = tmp_path / "a.bmp"
    Image.fromarray(pixels).save(path)
    found, before = set(), path.stat()
    for place in (0, 90_000, 200_000):
        content = bytearray(path.read_bytes())
        content[-1 - place] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        found.add(load_data(str(tmp_path), resolution=8).fingerprint)
    assert len(found) == 3 and path.stat().st_size == before.st_size


def test_importing_the_package_does_not_import_datasets():
    heavy = "{'datasets', 'torchvision', 'pandas', 'huggingface_hub'}"
    code = f"import sys, fewstep.distill.data; print(sys.modules.keys() & {heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
