"""Pictures in rows."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..writers import write_bytes, writing


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255 by rounding, out-of-range values cut; same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def rows_image(rows: Mapping[str, Tensor], scale: int = 2, title_width: int = 110) -> Image.Image:
    """One row per title: uint8 pictures (N, 3, H, W) side by side, enlarged by whole pixels."""
    first = next(iter(rows.values()))
    count, height, width = first.shape[0], first.shape[2] * scale, first.shape[3] * scale
    sheet = Image.new("RGB", (title_width + count * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (title, images) in enumerate(rows.items()):
        pen.text((6, y * height + height // 2 - 6), title, fill="black")
        for x, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (title_width + x * width, y * height))
    return sheet


def save_rows(rows: Mapping[str, Tensor], path: Path) -> Image.Image:
    """Rows of pictures in [-1, 1] as one PNG, written whole or not at all; the same picture."""
    sheet = rows_image({k: to_uint8(v) for k, v in rows.items()})
    save_png(sheet, path)
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Replaces the file in one rename; its folder is made."""
    content = BytesIO()
    picture.save(content, format="PNG")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())


def strip(images: Tensor, largest: int = 128) -> Image.Image:
    """uint8 pictures (N, 3, H, W) side by side, shrunk to `largest` pixels where they are larger."""
    row = Image.fromarray(torch.cat(list(images), dim=2).permute(1, 2, 0).cpu().numpy())
    side = images.shape[-1]
    if side <= largest:
        return row
    return row.resize((len(images) * largest, round(row.height * largest / side)), Image.Resampling.LANCZOS)
