"""Cutting, resizing and flattening of pictures, and the fingerprint."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from fewstep.distill.data import load_data
from fewstep.distill.data.images import MemoryImages, over_white, to_square
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
    code = f"from fewstep.distill.data import load_data; print({load}.fingerprint)"
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
