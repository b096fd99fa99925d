"""Pictures beside what a model made of them, as one PNG: `python contact_sheet.py OUT.png TITLE=SAMPLES ... [--count 24] [--line TEXT]`.

SAMPLES are shards as `mmgen eval` and `mmgen sample` write them: each sample's `image` stands left of its `sample.image`, its
caption below; with --fields FIELD FIELD TEXT, other fields. COUNT samples are shown at even distances, not the best ones.
"""

import argparse
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.data.shards import Shards, open_shards

SIDE, GAP, COLUMNS = 96, 10, 6
INK, SOFT, PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)


def enlarged(picture: np.ndarray) -> Image.Image:
    """A picture as it is, its pixels made larger and not smoother."""
    return Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def plain(text: str) -> str:
    """Text without the accents that the font that comes with Pillow lacks."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most two lines that fit the width, the last one cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = lines[:2]
    if len(lines) > 2:
        kept[1] += " …"
    for place, line in enumerate(kept):
        while font.getlength(line) > width and len(line) > 2:
            line = line.removesuffix(" …").removesuffix("…")[:-1] + "…"
        kept[place] = line
    return kept


def section(samples: Shards, title: str, count: int, given: str, made: str, text: str) -> Image.Image:
    """A title above a table of pairs: the picture of the data, and the model's. given, made, text: the fields that they are."""
    heading, font = ImageFont.load_default(20), ImageFont.load_default(13)
    shown = min(count, len(samples))
    chosen = [samples[i * len(samples) // shown].fields for i in range(shown)]
    pair = any(given in fields for fields in chosen)
    width, height = SIDE * (2 if pair else 1) + 2 * pair, SIDE + 40
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, 40 + rows * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 10), title, INK, heading)
    for place, fields in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        x, y = GAP + column * (width + GAP), 40 + row * (height + GAP)
        if given in fields:
            sheet.paste(enlarged(fields[given]), (x, y))
        sheet.paste(enlarged(fields[made]), (x + (SIDE + 2) * pair, y))
        for number, line in enumerate(shortened(plain(str(fields.get(text, ""))), font, width)):
            draw.text((x, y + SIDE + 3 + 16 * number), line, SOFT, font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures beside what a model made of them, as one PNG.")
    parser.add_argument("out", type=Path)
    parser.add_argument("samples", nargs="+", metavar="TITLE=SAMPLES")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--line", default="", help="a last line, such as a licence")
    parser.add_argument("--fields", nargs=3, default=["image", "sample.image", "caption"], metavar="FIELD")
    chosen = parser.parse_args()
    parts = []
    for entry in chosen.samples:
        title, _, folder = entry.partition("=")
        parts.append(section(open_shards(folder), title, chosen.count, *chosen.fields))
    foot = 30 if chosen.line else 0
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts) + foot), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    ImageDraw.Draw(sheet).text((GAP, y + 6), chosen.line, SOFT, ImageFont.load_default(13))
    sheet.save(chosen.out, optimize=True)


if __name__ == "__main__":
    main()
