"""What the runs of this study say: `python compare.py WORK --out DIR`, which `make` calls when they are done.

    DIR/results.json         every number of every run          DIR/fidelity.svg        fidelity against bits a pixel
    DIR/reconstructions.png  the same pictures by each arm      DIR/README.md           its tables, between the marks

A number of a table is the mean over seeds, with the half-width of its 95 % interval (Student's t over seeds; one seed has none).
"""

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.data.shards import open_shards
from stages.metrics.codebook import perplexity, usage
from stages.recipe import load_recipe

WORLDS = {"openmoji": "OpenMoji", "scenes": "Scenes of level 1"}
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles 0.975 of Student's t, 1 to 9 degrees of freedom
NETWORK = "efficientnet-lite0"  # whose features the perceptual and the Fréchet distance are of
COLUMNS = {  # key of a run's numbers → title, digits; a clock's best seed stands for all, what slowed the others was not the arm
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "perceptual": ("perceptual", 3),
    "frechet": ("Fréchet", 1),
    "usage": ("codes used", 2),
    "perplexity": ("perplexity", 0),
    "encode": ("encoded / s", 0),
    "decode": ("decoded / s", 0),
    "minutes": ("minutes", 1),
}
BEST = {"encode": max, "decode": max, "minutes": min}
SHOWN, SIDE, LABEL = 12, 64, 150  # of the picture of reconstructions

Run = dict[str, Any]


# --- the runs ---------------------------------------------------------------------------------------------------------------------


def read_runs(work: Path) -> list[Run]:
    """Every finished run below WORLD/ARM/SEED."""
    found = sorted(path.parent.parent for path in work.glob("*/*/*/scores/results.json"))
    return [read_run(folder) for folder in found if (folder / "tokens" / ".mmgen" / "run.json").is_file()]


def read_run(folder: Path) -> Run:
    world, arm, seed = folder.parts[-3:]
    config = json.loads((folder / "tokenizer" / "config.json").read_text())
    recipe = load_recipe(folder / "tokenizer")
    (autoencoder,) = recipe.autoencoders.values()
    tokens = open_shards(str(folder / "tokens"))
    shape = [int(side) for side in tokens.fields[f"image.{autoencoder.store}"]["shape"]]
    run: Run = {
        "world": world,
        "arm": arm,
        "seed": int(seed),
        "recipe": recipe.name,
        "kind": getattr(autoencoder, "quantizer", autoencoder).kind,
        "shape": shape,
        "codes": autoencoder.codebook_size,
        "parameters": config["parameters"],
        "steps": config["steps"],
        "minutes": minutes(folder / "tokenizer" / "metrics.jsonl"),
    }
    if autoencoder.codebook_size is not None:
        counts = np.zeros(autoencoder.codebook_size, np.int64)
        for sample in tokens:
            counts += np.bincount(sample.fields["image.codes"].ravel(), minlength=len(counts))
        run |= {"usage": usage(counts), "perplexity": perplexity(counts), "tokens": int(counts.sum())}
    return run | scores(folder / "scores")


def minutes(log: Path) -> float:
    """Of training alone, from the log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return max(line["seconds"] for line in lines if "seconds" in line) / 60


def scores(folder: Path) -> Run:
    rows = json.loads((folder / "results.json").read_text())["results"]
    own = {(row["metric"], row["category"]): row["value"] for row in rows if row["control"] is None}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = next(line for line in reversed(lines) if "encode_per_second" in line)
    return {
        "psnr": own["psnr", "all"],
        "ssim": own["ssim", "all"],
        "perceptual": own["perceptual-distance", NETWORK],
        "frechet": own["frechet-distance", NETWORK],
        "bits": own["bits-per-pixel", "nominal"],
        "encode": speed["encode_per_second"],
        "decode": speed["decode_per_second"],
    }


def grouped(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """(world, arm) → its runs, one a seed."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["world"], run["arm"]].append(run)
    return groups


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the half-width of its 95 % interval over seeds."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


# --- tables -----------------------------------------------------------------------------------------------------------------------


def cell(key: str, values: Sequence[float], digits: int) -> str:
    if key in BEST:
        return f"{BEST[key](values):,.{digits}f}"
    mean, half = mean_and_half(values)
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if half is not None else "")


def table(groups: Mapping[tuple[str, str], list[Run]], world: str, arms: Sequence[str]) -> str:
    shown = {key: column for key, column in COLUMNS.items() if any(key in run for arm in arms for run in groups[world, arm])}
    lines = ["| | codes | k | bits a pixel | parameters | " + " | ".join(title for title, _ in shown.values()) + " |"]
    lines.append("|---|---|--:|--:|--:|" + "--:|" * len(shown))
    for arm in arms:
        runs = groups[world, arm]
        first = runs[0]
        cells = [cell(key, [run[key] for run in runs], digits) if key in first else "–" for key, (_, digits) in shown.items()]
        size = f"{first['codes']:,}" if first["codes"] else "–"
        lines.append(
            f"| `{arm}` | {' x '.join(map(str, first['shape']))} | {size} | {first['bits']:.2f} | {first['parameters'] / 1e6:.2f} M | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def write_tables(readme: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its marks."""
    text = readme.read_text(encoding="utf-8")
    for name, content in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"(?s){re.escape(start)}.*?{re.escape(end)}", lambda _, c=content, a=start, b=end: f"{a}\n\n{c}\n\n{b}", text)
    readme.write_text(text, encoding="utf-8")


# --- fidelity against bits --------------------------------------------------------------------------------------------------------

WIDE, HIGH, LEFT, BELOW, ABOVE = 430, 380, 44, 44, 34
PAPER, INK, SOFT, RULE = "#ffffff", "#1d1c1a", "#66635d", "#e3e0d8"
SWEPT = {"vqgan": "#2353c4", "fsq": "#c2600c"}
Point = tuple[float, float, float | None]  # bits a pixel, mean PSNR, half-width of its interval


def plot(groups: Mapping[tuple[str, str], list[Run]], worlds: Sequence[str]) -> str:
    """SVG: PSNR over bits a pixel (logarithmic): a panel a world with a dot an arm, and one in which a codebook grows. Bars are intervals."""
    points = {key: (runs[0]["bits"], *mean_and_half([run["psnr"] for run in runs])) for key, runs in groups.items()}
    panels = [(WORLDS[world], {arm: point for (w, arm), point in points.items() if w == world and "@" not in arm}) for world in worlds]
    panels.append(("OpenMoji, codebooks of 64 to 16,384", {arm: point for (_, arm), point in points.items() if "@" in arm}))
    drawn = [panel(title, found, index * WIDE) for index, (title, found) in enumerate(panels) if found]
    size = f'viewBox="0 0 {WIDE * len(drawn)} {HIGH}"'
    font = 'font-family="system-ui, sans-serif" font-size="11"'
    label = "PSNR of reconstructions against bits a pixel"
    box = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label="{label}">{box}{"".join(drawn)}</svg>\n'


def panel(title: str, points: Mapping[str, Point], shift: float) -> str:
    low_x, high_x = (pick(math.log2(bits) for bits, _, _ in points.values()) for pick in (min, max))
    low_y = math.floor(min(mean - (half or 0) for _, mean, half in points.values()) - 0.3)
    high_y = math.ceil(max(mean + (half or 0) for _, mean, half in points.values()) + 0.3)

    def x(bits: float) -> float:
        return shift + LEFT + 16 + (WIDE - LEFT - 48) * (math.log2(bits) - low_x) / max(1e-9, high_x - low_x)

    def y(value: float) -> float:
        return HIGH - BELOW - (HIGH - BELOW - ABOVE) * (value - low_y) / (high_y - low_y)

    marks = [f'<text x="{shift + LEFT}" y="14" font-size="13" font-weight="600" fill="{INK}">{title}</text>']
    for value in range(low_y, high_y + 1, max(1, (high_y - low_y) // 6)):
        marks.append(f'<line x1="{shift + LEFT}" x2="{shift + WIDE - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{RULE}"/>')
        marks.append(f'<text x="{shift + LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="{SOFT}">{value}</text>')
    powers = [2.0**power for power in range(-3, 6) if low_x <= power <= high_x]
    for bits in powers if len(powers) > 2 else sorted({round(point[0], 3) for point in points.values()}):
        marks.append(f'<text x="{x(bits):.1f}" y="{HIGH - BELOW + 16}" text-anchor="middle" fill="{SOFT}">{bits:.3g}</text>')
    marks.append(f'<text x="{shift + LEFT}" y="{HIGH - 8}" fill="{SOFT}">bits a pixel</text>')
    marks.append(f'<text x="{shift + LEFT}" y="{ABOVE - 5}" fill="{SOFT}" font-size="10">PSNR, dB</text>')
    for name, colour in SWEPT.items():
        line = sorted((bits, mean) for arm, (bits, mean, _) in points.items() if arm.startswith(f"{name}@"))
        path = " ".join(f"{x(bits):.1f},{y(mean):.1f}" for bits, mean in line)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if line:
            marks.append(f'<text x="{x(line[-1][0]):.1f}" y="{y(line[-1][1]) - 28:.1f}" text-anchor="end" fill="{colour}">{name}</text>')
    taken = [(x(bits) - 5, y(mean) - 5, x(bits) + 5, y(mean) + 5) for bits, mean, _ in points.values()]
    for arm, (bits, mean, half) in sorted(points.items(), key=lambda item: -item[1][1]):
        colour = SWEPT.get(arm.split("@")[0], INK)
        if half is not None:
            marks.append(
                f'<line x1="{x(bits):.1f}" x2="{x(bits):.1f}" y1="{y(mean - half):.1f}" y2="{y(mean + half):.1f}" stroke="{colour}"/>'
            )
        marks.append(f'<circle cx="{x(bits):.1f}" cy="{y(mean):.1f}" r="3.5" fill="{colour}"><title>{arm}</title></circle>')
        marks.append(label(arm.split("@")[-1], x(bits), y(mean), colour, taken, shift + WIDE - 6))
    return "".join(marks)


def label(text: str, x: float, y: float, colour: str, taken: list[tuple[float, float, float, float]], edge: float) -> str:
    """The name of a dot as near to it as there is room, with a line to the dot where that is not beside it."""
    width = 6.2 * len(text)
    above = [(-width / 2, -14.0), (-width / 2, 14.0)] if text.isdigit() else []  # a codebook's size, not on its line
    for reach in range(0, 200, 6):
        for dx, dy in (
            *above,
            (8, reach),
            (-8 - width, reach),
            (8, -reach),
            (-8 - width, -reach),
            (14 + reach, reach),
            (14 + reach, -reach),
        ):
            box = (x + dx, y + dy - 6, x + dx + width, y + dy + 6)
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken)
            if free and box[2] < edge and box[1] >= ABOVE and box[3] < HIGH - BELOW:
                taken.append(box)
                line = f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{max(box[0], min(x, box[2])):.1f}" y2="{y + dy:.1f}" stroke="{RULE}"/>'
                return (line if reach > 6 else "") + f'<text x="{box[0]:.1f}" y="{y + dy + 4:.1f}" fill="{colour}">{text}</text>'
    return ""


# --- the same pictures by every arm -----------------------------------------------------------------------------------------------


def contact_sheet(work: Path, world: str, arms: Sequence[str]) -> Image.Image:
    """A row of pictures as they are, and a row an arm (its first seed) of what comes back; pictures at even distances."""
    folders = {arm: sorted((work / world / arm).glob("*/scores/samples"))[0] for arm in arms}
    opened = {arm: open_shards(str(folder)) for arm, folder in folders.items()}
    count = min(map(len, opened.values()))
    chosen = [round(index * (count - 1) / (SHOWN - 1)) for index in range(SHOWN)]
    first = next(iter(opened.values()))
    rows = {WORLDS[world]: [first[index].fields["image"] for index in chosen]}
    rows |= {arm: [shards[index].fields["sample.image"] for index in chosen] for arm, shards in opened.items()}
    sheet = Image.new("RGB", (LABEL + SHOWN * (SIDE + 6), len(rows) * (SIDE + 6) + 6), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, (name, pictures) in enumerate(rows.items()):
        top = 6 + line * (SIDE + 6)
        draw.text((8, top + SIDE / 2 - 8), name, fill=(24, 24, 27), font=font)
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL + column * (SIDE + 6), top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    runs = read_runs(arguments.work)
    if not runs:
        parser.error(f"{arguments.work}: no finished runs; `make` makes them")
    groups = grouped(runs)
    worlds = [world for world in WORLDS if any(w == world for w, _ in groups)]
    arms = {world: [arm for w, arm in groups if w == world and "@" not in arm] for world in worlds}
    swept = [arm for w, arm in sorted(groups, key=lambda key: (key[1].split("@")[0], groups[key][0]["codes"] or 0)) if "@" in arm]
    tables = {world: table(groups, world, sorted(arms[world], key=lambda arm: groups[world, arm][0]["bits"])) for world in worlds}
    if swept:
        tables["codes"] = table(groups, "openmoji", swept)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "fidelity.svg").write_text(plot(groups, worlds), encoding="utf-8")
    contact_sheet(arguments.work, worlds[0], arms[worlds[0]]).save(arguments.out / "reconstructions.png", optimize=True)
    if (arguments.out / "README.md").is_file():
        write_tables(arguments.out / "README.md", tables)
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main()
