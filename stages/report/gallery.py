"""What the model made, to look at: drawn pictures with the reader's verdict, answers, captions, reconstructions.

Samples are shown in the order they have in the shards, never picked; the heading says how many there were.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.data.scenes import Scene, SceneObject, described_scene, parse_caption, read_scene
from stages.data.shards import open_shards, split_folders
from stages.errors import DataError
from stages.metrics.codebook import perplexity, usage
from stages.metrics.psnr import is_reconstruction, psnr
from stages.metrics.question_accuracy import plain
from stages.metrics.score import check_fields
from stages.report.chart import sorted_bars
from stages.report.folders import Folder
from stages.report.html import Markup, el
from stages.report.pictures import Pictures

Fields = dict[str, Any]
MOST_CODES = 2**22  # of a codebook that is drawn
MOST_LOOKED_AT = 3000  # samples read while searching for enough of each kind


@dataclass(frozen=True)
class Made:
    """What one folder of samples holds, sorted by what there is to see; `total` counts all samples of that kind that were read."""

    folder: Folder
    drawn: list[Fields]
    questions: list[Fields]
    captions: list[Fields]
    reconstructions: list[Fields]
    code_counts: list[int]
    total: dict[str, int]


def look_through(folder: Folder, limit: int) -> Made:
    """The first `limit` samples of each kind in a folder of shards (of `val` where it has splits), and the codes of all it reads."""
    made = Made(folder, [], [], [], [], [], {})
    splits = split_folders(str(folder.path))
    shards = open_shards(str(folder.path), split="val" if "val" in splits else next(iter(splits), None))
    sizes = {name: info.get("codebook_size") or 0 for name, info in shards.fields.items()}
    code_field = next((name for name in ("sample.image.codes", "image.codes") if 0 < sizes.get(name, 0) <= MOST_CODES), None)
    if code_field:
        made.code_counts.extend([0] * shards.fields[code_field]["codebook_size"])
    kinds: list[tuple[str, list[Fields], Callable[[Fields], bool]]] = [
        ("reconstructions", made.reconstructions, is_reconstruction),
        ("drawn", made.drawn, lambda fields: "sample.image" in fields and not is_reconstruction(fields)),
        ("questions", made.questions, lambda fields: "sample.qa" in fields and "image" in fields),
        ("captions", made.captions, lambda fields: "sample.caption" in fields and "image" in fields),
    ]
    for index in range(min(len(shards), MOST_LOOKED_AT)):
        sample = shards.read_or_skip(index)
        if sample is None:
            continue
        check_fields(sample.fields, sample)
        if code_field:
            codes = np.asarray(sample.fields[code_field]).ravel()
            if codes.dtype.kind not in "iu" or (codes.size and not 0 <= codes.min() <= codes.max() < len(made.code_counts)):
                raise DataError(
                    f"{sample.source}: {sample.key}: field '{code_field}': expected codes from 0 to {len(made.code_counts) - 1}"
                )
            for code in codes.tolist():
                made.code_counts[code] += 1
        for name, shown, fits in kinds:
            if fits(sample.fields):
                made.total[name] = made.total.get(name, 0) + 1
                if len(shown) < limit:
                    shown.append(sample.fields)
    return made


# --- drawn pictures ---------------------------------------------------------------------------------------------------------------


def drawn_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards"}, fill(made.drawn, lambda fields: drawn_card(fields, pictures)))


def drawn_card(fields: Fields, pictures: Pictures) -> Markup | None:
    prompt = str(fields.get("caption") or "")
    drawn = pictures.img(fields["sample.image"], f"drawn for: {prompt}")
    true = pictures.img(fields["image"], f"real picture of: {prompt}") if "image" in fields else None
    if drawn is None:
        return None
    real = el("figure", {}, true, el("figcaption", {}, "real")) if true else None
    made = el("figure", {}, drawn, el("figcaption", {}, "drawn"))
    graph = fields.get("scene")
    word = verdict(fields["sample.image"], graph) if graph else None
    pair = el("div", {"class": "pair" if true else "pair one"}, real, made)
    return el("article", {"class": "card"}, el("p", {"class": "prompt"}, prompt), pair, word)


def verdict(picture: Any, graph: dict[str, Any]) -> Markup:
    """The reader's word on each object that was asked for, and on each that was not."""
    try:
        truth = Scene.from_json(graph)
        reading = read_scene(picture, truth.level)
    except (ValueError, DataError) as error:
        return el("p", {"class": "bad small"}, f"not readable: {error}")
    if not reading.valid:
        lines = [judged(False, described(asked, truth)) for asked in truth.objects]
        said = "Too blurred or mixed for the reader to believe: it counts as empty."
        return el("div", {}, el("ul", {"class": "verdict"}, lines), el("p", {"class": "soft small"}, said))
    lines = []
    for asked in truth.objects:
        there = reading.scene.by_place.get(asked.place)
        if there == asked:
            lines.append(judged(True, described(asked, truth)))
        else:
            lines.append(judged(False, described(asked, truth), f"drawn: {described(there, truth, place=False) if there else 'nothing'}"))
    extras = [thing for thing in reading.scene.objects if thing.place not in truth.by_place]
    lines += [judged(False, "not asked for", described(extra, truth)) for extra in extras]
    return el("ul", {"class": "verdict"}, lines)


def judged(right: bool, what: str, instead: str = "") -> Markup:
    return el("li", {}, sign(right), el("span", {}, what, el("span", {"class": "soft"}, f" — {instead}") if instead else None))


def sign(right: bool) -> Markup:
    word = "right" if right else "wrong"
    return el("span", {"class": f"sign {'good' if right else 'bad'}", "role": "img", "aria-label": word}, "✓" if right else "✗")


def described(thing: SceneObject, scene: Scene, *, place: bool = True) -> str:
    """`large red circle, top left`: the attributes that vary at this level."""
    named = [getattr(thing, name) for name in scene.row.named if name != "place"]
    return " ".join(named) + (f", {thing.place}" if place else "")


# --- questions, captions, reconstructions, codes ----------------------------------------------------------------------------------


def question_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards"}, fill(made.questions, lambda fields: question_card(fields, pictures)))


def question_card(fields: Fields, pictures: Pictures) -> Markup | None:
    picture = pictures.img(fields["image"], str(fields.get("caption") or "the picture asked about"))
    if picture is None:
        return None
    lines = []
    for entry in fields["sample.qa"][:5]:
        right = plain(entry["answer"]) == plain(entry["truth"])
        given = [el("b", {}, entry["answer"] or "(nothing)"), None if right else el("span", {"class": "soft"}, f" — {entry['truth']}")]
        lines.append(el("li", {}, sign(right), el("span", {}, entry["question"], el("br"), given)))
    left = len(fields["sample.qa"]) - len(lines)
    more = el("li", {}, el("span"), el("span", {"class": "soft"}, f"and {left} more")) if left > 0 else None
    return el("article", {"class": "card"}, el("div", {"class": "qa"}, el("figure", {}, picture), el("ul", {}, lines, more)))


def caption_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards"}, fill(made.captions, lambda fields: caption_card(fields, pictures)))


def caption_card(fields: Fields, pictures: Pictures) -> Markup | None:
    picture = pictures.img(fields["image"], str(fields.get("caption") or "the picture described"))
    if picture is None:
        return None
    given, true = fields["sample.caption"], str(fields.get("caption", ""))
    lines = [el("li", {}, caption_sign(fields), el("span", {}, given or "(nothing)"))]
    if true and true != given:
        lines.append(el("li", {}, el("span"), el("span", {"class": "soft"}, true)))
    return el("article", {"class": "card"}, el("div", {"class": "qa"}, el("figure", {}, picture), el("ul", {}, lines)))


def caption_sign(fields: Fields) -> Markup:
    """Whether a caption names exactly the objects of the scene, where there is a scene to ask."""
    if not fields.get("scene"):
        return el("span")
    try:
        truth = Scene.from_json(fields["scene"])
    except DataError:
        return el("span")
    return sign(described_scene(parse_caption(fields["sample.caption"]), truth.level) == truth)


def reconstruction_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards narrow"}, fill(made.reconstructions, lambda fields: reconstruction_card(fields, pictures)))


def reconstruction_card(fields: Fields, pictures: Pictures) -> Markup | None:
    about = str(fields.get("caption") or "picture")
    original, again = pictures.img(fields["image"], f"original: {about}"), pictures.img(fields["sample.image"], f"reconstruction: {about}")
    if original is None or again is None:
        return None
    same = fields["sample.image"].shape == fields["image"].shape
    quality = f"{psnr(fields['sample.image'], fields['image']):.1f} dB" if same else "of another size"
    left = el("figure", {}, original, el("figcaption", {}, "original"))
    right = el("figure", {}, again, el("figcaption", {}, el("span", {"class": "num"}, quality)))
    return el("article", {"class": "card"}, el("div", {"class": "pair"}, left, right))


def codes_chart(made: Made) -> Markup:
    counts = np.array(made.code_counts)
    used, size, tokens = int((counts > 0).sum()), len(counts), int(counts.sum())
    heading = el("h3", {}, "Tokens per code", el("span", {"class": "soft num"}, f"{used:,} of {size:,} codes occur"))
    chart = el("figure", {"class": "chart"}, heading, sorted_bars("Tokens per code", made.code_counts))
    facts = {
        "From": made.folder.name,
        "Tokens counted": f"{tokens:,}, {tokens / size:.1f} a code",
        "Usage": f"{usage(counts):.3f} of the codes occur",
        "Perplexity": f"{perplexity(counts):.1f}, as if so many codes were used equally",
    }
    entries = [el("div", {}, el("dt", {}, name), el("dd", {}, value)) for name, value in facts.items()]
    return Markup(chart + el("dl", {"class": "facts-list"}, entries))


def fill(samples: list[Fields], card: Callable[[Fields], Markup | None]) -> Iterator[Markup]:
    """Cards until the page's budget for pictures is used up."""
    for fields in samples:
        made = card(fields)
        if made is None:
            return
        yield made
