"""What the model made, to look at: drawn pictures with the reader's verdict, answers, captions, reconstructions.

Samples are shown in the order they have in the shards, never picked; the heading says how many there were.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from stages.data.scenes import Scene, SceneObject, described_scene, parse_caption, read_scene
from stages.data.shards import open_shards, split_folders
from stages.errors import DataError
from stages.metrics.codebook import perplexity, usage
from stages.metrics.psnr import is_reconstruction, psnr
from stages.metrics.question_accuracy import plain
from stages.report.chart import sorted_bars
from stages.report.folders import Folder
from stages.report.html import Markup, el
from stages.report.pictures import Pictures

Fields = dict[str, Any]
MOST_LOOKED_AT = 3000  # samples read while searching for enough of each kind
MOST_CODES = 2**22  # of a codebook whose usage is drawn


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
    code_field = next((name for name in ("sample.image.codes", "image.codes") if shards.fields.get(name, {}).get("codebook_size")), None)
    size = shards.fields[code_field]["codebook_size"] if code_field else 0
    counts = np.zeros(size if size <= MOST_CODES else 0, dtype=np.int64)
    kinds: list[tuple[str, list[Fields], Callable[[Fields], bool]]] = [
        ("reconstructions", made.reconstructions, from_its_original),
        ("drawn", made.drawn, lambda fields: is_picture(fields.get("sample.image")) and not from_its_original(fields)),
        ("questions", made.questions, lambda fields: bool(answered(fields)) and is_picture(fields.get("image"))),
        ("captions", made.captions, lambda fields: isinstance(fields.get("sample.caption"), str) and is_picture(fields.get("image"))),
    ]
    for index in range(min(len(shards), MOST_LOOKED_AT)):
        sample = shards.read_or_skip(index)
        if sample is None:
            continue
        codes = sample.fields.get(code_field) if code_field else None
        if isinstance(codes, np.ndarray) and codes.dtype.kind in "iu":
            counts += np.bincount(codes[(codes >= 0) & (codes < len(counts))].ravel().astype(np.int64), minlength=len(counts))
        for name, shown, fits in kinds:
            if fits(sample.fields):
                made.total[name] = made.total.get(name, 0) + 1
                if len(shown) < limit:
                    shown.append(sample.fields)
    made.code_counts.extend(counts.tolist() if counts.any() else ())
    return made


def is_picture(value: Any) -> TypeGuard[np.ndarray]:
    """Whether this is an RGB picture; a field of that name from elsewhere may be anything."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3 and value.size > 0


def from_its_original(fields: Fields) -> bool:
    """Whether `sample.image` is `image` after a round trip."""
    meta, made, true = fields.get("meta"), fields.get("sample.image"), fields.get("image")
    tasks = meta.get("tasks") if isinstance(meta, Mapping) else None
    return isinstance(tasks, list) and is_picture(made) and is_picture(true) and made.shape == true.shape and is_reconstruction(fields)


def answered(fields: Fields) -> list[dict[str, str]]:
    """The questions of a sample with the model's answers and the true ones, as far as they are such."""
    entries = fields.get("sample.qa")
    asked = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    return [{name: str(entry.get(name, "")) for name in ("question", "answer", "truth")} for entry in asked]


def scene_of(fields: Fields) -> Scene | None:
    """The scene an image was asked to show; None for no scene, or what is none."""
    try:
        return Scene.from_json(fields["scene"])
    except (KeyError, TypeError, DataError):
        return None


# --- drawn pictures ---------------------------------------------------------------------------------------------------------------


def drawn_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards"}, fill(made.drawn, lambda fields: drawn_card(fields, pictures)))


def drawn_card(fields: Fields, pictures: Pictures) -> Markup | None:
    prompt = str(fields.get("caption") or "")
    drawn = pictures.img(fields["sample.image"], f"drawn for: {prompt}")
    true = pictures.img(fields["image"], f"real picture of: {prompt}") if is_picture(fields.get("image")) else None
    if drawn is None:
        return None
    real = el("figure", {}, true, el("figcaption", {}, "real")) if true else None
    made = el("figure", {}, drawn, el("figcaption", {}, "drawn"))
    truth = scene_of(fields)
    word = verdict(fields["sample.image"], truth) if truth is not None else None
    pair = el("div", {"class": "pair" if true else "pair one"}, real, made)
    return el("article", {"class": "card"}, el("p", {"class": "prompt"}, prompt), pair, word)


def verdict(picture: Any, truth: Scene) -> Markup:
    """The reader's word on each object that was asked for, and on each that was not."""
    try:
        reading = read_scene(picture, truth.level)
    except ValueError as error:
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
    lines, entries = [], answered(fields)
    for entry in entries[:5]:
        right = plain(entry["answer"]) == plain(entry["truth"])
        given = [el("b", {}, entry["answer"] or "(nothing)"), None if right else el("span", {"class": "soft"}, f" — {entry['truth']}")]
        lines.append(el("li", {}, sign(right), el("span", {}, entry["question"], el("br"), given)))
    left = len(entries) - len(lines)
    more = el("li", {}, el("span"), el("span", {"class": "soft"}, f"and {left} more")) if left > 0 else None
    return el("article", {"class": "card"}, el("div", {"class": "qa"}, el("figure", {}, picture), el("ul", {}, lines, more)))


def caption_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards"}, fill(made.captions, lambda fields: caption_card(fields, pictures)))


def caption_card(fields: Fields, pictures: Pictures) -> Markup | None:
    picture = pictures.img(fields["image"], str(fields.get("caption") or "the picture described"))
    if picture is None:
        return None
    given, true = fields["sample.caption"], str(fields.get("caption") or "")
    lines = [el("li", {}, caption_sign(fields), el("span", {}, given or "(nothing)"))]
    if true and true != given:
        lines.append(el("li", {}, el("span"), el("span", {"class": "soft"}, true)))
    return el("article", {"class": "card"}, el("div", {"class": "qa"}, el("figure", {}, picture), el("ul", {}, lines)))


def caption_sign(fields: Fields) -> Markup:
    """Whether a caption names exactly the objects of the scene, where there is a scene to ask."""
    truth = scene_of(fields)
    if truth is None:
        return el("span")
    return sign(described_scene(parse_caption(fields["sample.caption"]), truth.level) == truth)


def reconstruction_cards(made: Made, pictures: Pictures) -> Markup:
    return el("div", {"class": "cards narrow"}, fill(made.reconstructions, lambda fields: reconstruction_card(fields, pictures)))


def reconstruction_card(fields: Fields, pictures: Pictures) -> Markup | None:
    about = str(fields.get("caption") or "picture")
    original, again = pictures.img(fields["image"], f"original: {about}"), pictures.img(fields["sample.image"], f"reconstruction: {about}")
    if original is None or again is None:
        return None
    quality = f"{psnr(fields['sample.image'], fields['image']):.1f} dB"
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
