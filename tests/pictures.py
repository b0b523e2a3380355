"""Small folders of captioned pictures, as a user keeps them."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("ellipse", "rectangle")


def write_pictures(folder: Path, count: int, *, side: int = 48, seed: int = 0, captions: bool = True) -> Path:
    """`count` pictures NNN.png of one coloured shape each, a NNN.txt beside each: "red ellipse 0", ..."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        colour, shape = COLOURS[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)]
        picture = Image.new("RGB", (side, side), "white")
        x, y = draw.randrange(side // 3), draw.randrange(side // 3)
        getattr(ImageDraw.Draw(picture), shape)((x, y, x + side // 2, y + side // 2), fill=colour)
        picture.save(folder / f"{i:03}.png")
        if captions:
            (folder / f"{i:03}.txt").write_text(f"{colour} {shape} {i}")
    return folder
