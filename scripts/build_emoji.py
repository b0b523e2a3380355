"""Build the embedded captioned emoji set from the public npm packages.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0    # then unpack each
    python scripts/build_emoji.py GOOGLE_FOLDER TWITTER_FOLDER --output distill/data/emoji

Writes one RGB sheet per style (32 px cells on white, row-major in the order of metadata.jsonl) and
metadata.jsonl with code points, caption, category, subcategory and split of each cell. Components, flags and
skin-tone variants are left out. Licences and credits: distill/data/emoji/NOTICE.md.
"""

import argparse
import json
import random
import re
from pathlib import Path

from PIL import Image

CELL, COLUMNS, SPLIT_SEED = 32, 40, 0
SPLIT_SHARES = {"train": 0.61, "reward": 0.15, "score": 0.10, "holdout": 0.14}
ADULTS = {"man", "men", "woman", "women", "person", "people", "adult", "older"}
GENDER = ADULTS | {"boy", "girl", "boys", "girls"}


def caption_of(entry: dict) -> str:
    """The Unicode name as lower-case words; hyphens and punctuation become spaces."""
    special = {"KEYCAP: *": "keycap asterisk", "HASH KEY": "keycap hash"}
    name = special.get(entry["name"], entry["name"]).lower().replace("’", "")
    return " ".join(re.sub(r"[^a-z0-9]+", " ", name).split())


def group_of(caption: str) -> str:
    """What names share that differ only in gender or in the hour of a clock: one side of the split."""
    if caption.startswith("clock face"):
        return "clock face"
    words = [w for w in caption.split() if w not in GENDER]
    return " ".join(words) or "person"


def split_of_groups(entries: list[dict]) -> dict[str, str]:
    """Assign whole groups to splits, category by category, in a fixed random order."""
    rng, out = random.Random(SPLIT_SEED), {}
    for category in sorted({e["category"] for e in entries}):
        groups: dict[str, int] = {}
        for e in entries:
            if e["category"] == category:
                groups[e["group"]] = groups.get(e["group"], 0) + 1
        names = sorted(groups)
        rng.shuffle(names)
        total, filled = sum(groups.values()), dict.fromkeys(SPLIT_SHARES, 0)
        for name in names:  # the split that lacks most of its share takes the next group
            split = max(SPLIT_SHARES, key=lambda s: SPLIT_SHARES[s] - filled[s] / total)
            split = out.get(name, split)
            filled[split] += groups[name]
            out[name] = split
    return out


def sheet(folder: Path, style: str, entries: list[dict]) -> Image.Image:
    """Composite each 32 px cell (pitch 34, 1 px border) on white and lay the cells out in COLUMNS columns."""
    source = Image.open(folder / f"img/{style}/sheets/{CELL}.png").convert("RGBA")
    rows = -(-len(entries) // COLUMNS)
    out = Image.new("RGB", (COLUMNS * CELL, rows * CELL), "white")
    for i, e in enumerate(entries):
        x, y = (e[k] * (CELL + 2) + 1 for k in ("sheet_x", "sheet_y"))
        cell = Image.new("RGBA", (CELL, CELL), "white")
        cell.alpha_composite(source.crop((x, y, x + CELL, y + CELL)))
        out.paste(cell.convert("RGB"), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("google", type=Path)
    parser.add_argument("twitter", type=Path)
    parser.add_argument("--output", type=Path, default=Path("distill/data/emoji"))
    args = parser.parse_args()
    entries = [
        e
        for e in json.loads((args.google / "emoji.json").read_text())
        if e["category"] not in ("Component", "Flags")
    ]
    for e in entries:
        e["caption"] = caption_of(e)
        e["group"] = group_of(e["caption"])
    splits = split_of_groups(entries)
    args.output.mkdir(parents=True, exist_ok=True)
    for folder, style, name in ((args.google, "google", "noto"), (args.twitter, "twitter", "twemoji")):
        sheet(folder, style, entries).save(args.output / f"{name}.png", optimize=True)
    with open(args.output / "metadata.jsonl", "w") as f:
        for e in entries:
            row = {k: e[k] for k in ("unified", "caption", "category", "subcategory")}
            f.write(json.dumps({**row, "split": splits[e["group"]]}) + "\n")
    counts = {s: sum(splits[e["group"]] == s for e in entries) for s in SPLIT_SHARES}
    print(f"{len(entries)} emoji written to {args.output}: {counts}")


if __name__ == "__main__":
    main()
