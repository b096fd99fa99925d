"""Scores on the page: the headline tiles, and a table for every metric in which a column holds one protocol and no other.

Two numbers share a column only if they were measured in the same way: same prompts, same number of samples, same resize filter, same
reference, same feature network. What differs gets a column of its own with a footnote that says how. Sampling settings (guidance, steps, seed)
are part of a run, not of the measurement: they stand with the run's name.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages.report.chart import short
from stages.report.folders import Folder
from stages.report.html import Child, Markup, el

Row = dict[str, Any]

CONTROLS = {"untrained": "untrained model", "shuffled": "prompts shuffled"}


@dataclass(frozen=True)
class Words:
    """How a metric is spoken of. `share` numbers lie in [0, 1]; `lead` is the category that stands for the whole."""

    title: str
    says: str
    lead: str = "all"
    share: bool = True
    unit: str = ""


WORDS = {
    "scene-accuracy": Words(
        "Scenes drawn from their description",
        "An exact reader turns each drawn picture back into objects and compares them with what the prompt asked for.",
        lead="objects",
    ),
    "edit-accuracy": Words(
        "Edits that follow their instruction",
        "The exact reader on edited pictures: was done what the instruction says, and was the rest left alone?",
        lead="changed",
    ),
    "question-accuracy": Words("Questions answered", "Answers about a picture, by type of question. Chance is the best constant answer."),
    "caption-correctness": Words(
        "Captions written", "Each caption is parsed back into objects and compared with what the picture shows.", lead="objects"
    ),
    "retrieval": Words(
        "Drawn pictures recognised", "Is the real picture of the same prompt the nearest one (or among the nearest five)?", lead="R@1"
    ),
    "psnr": Words("Reconstruction, PSNR", "Peak signal-to-noise ratio, per picture, then the mean.", share=False, unit="dB"),
    "ssim": Words("Reconstruction, SSIM", "Structural similarity, per picture, then the mean."),
    "reconstructed-scenes": Words(
        "Scenes kept by the tokenizer",
        "The exact reader on reconstructions: which objects are still there as they were.",
        lead="objects",
    ),
    "perceptual-distance": Words(
        "Reconstruction, perceptual distance",
        "Between a picture and its reconstruction, in the features of the network named. Lower is better; networks do not compare.",
        lead="",
        share=False,
    ),
    "codebook": Words(
        "Codebook", "Usage is the share of codes that occur, perplexity the number of equally frequent codes.", lead="usage", share=False
    ),
    "bits-per-pixel": Words(
        "Bits per pixel",
        "What a picture costs: as it is stored, and as its codes' frequencies would allow.",
        lead="nominal",
        share=False,
    ),
    "frechet-distance": Words(
        "Fréchet distance",
        "Between drawn or reconstructed and real pictures, in the features of the network named. Lower is better.",
        lead="",
        share=False,
    ),
    "bits-per-byte": Words("Bits per byte", "What the model needs to write the held-out text. Lower is better.", share=False),
}


LABELS = {
    "all": "all",
    "objects": "objects right",
    "objects-precision": "of the objects there, right",
    "scenes": "whole scenes right",
    "object-place": "something at the place",
    "object-size": "right size",
    "object-texture": "right texture",
    "object-colour": "right colour",
    "object-shape": "right shape",
    "one-object": "one object",
    "two-objects": "two objects",
    "colour-attribution": "colour attribution",
    "readable": "pictures the reader believes",
    "changed": "edits done",
    "kept": "untouched objects kept",
    "true": "sentences that are true",
    "parsed": "sentences that parse",
    "nominal": "as stored",
    "entropy": "with the codes' entropy",
}


def words(metric: str) -> Words:
    return WORDS.get(metric, Words(metric.replace("-", " ").capitalize(), "", share=False))


# --- what may be compared ---------------------------------------------------------------------------------------------------------


def protocol_of(row: Row) -> str:
    """What must be equal for two numbers to share a column, as canonical JSON."""
    measured = {name: value for name, value in row.get("protocol", {}).items() if name != "sampling"}
    return json.dumps([row["metric"], row["category"], row["split"], measured], sort_keys=True)


@dataclass(frozen=True, eq=False)
class Column:
    """One category of a metric on a split under one protocol; cells[(run, control)] is the row of results.json that belongs there."""

    metric: str
    split: str
    category: str
    protocol: str
    cells: dict[tuple[str, str | None], Row]


def columns_of(folders: list[Folder], metric: str, split: str) -> list[Column]:
    """Every (category, protocol) of a metric on a split, in the order first met. A control joins the column of its own model's number:
    it is measured in the same way, over what it had (a question may have had no partner to be shuffled with)."""
    columns: dict[tuple[str, str], Column] = {}
    for folder in folders:
        rows = [row for row in folder.results if row["metric"] == metric and row["split"] == split]
        own = {row["category"]: protocol_of(row) for row in rows if row["control"] is None}
        for row in rows:
            protocol = own.get(row["category"])
            if protocol is not None and (row["value"] is not None or row["control"] is None):
                column = columns.setdefault((row["category"], protocol), Column(metric, split, row["category"], protocol, {}))
                column.cells[folder.name, row["control"]] = row
    order = list(dict.fromkeys(column.category for column in columns.values()))
    return sorted(columns.values(), key=lambda column: order.index(column.category))


def metrics_of(folders: Iterable[Folder]) -> list[tuple[str, str]]:
    """(metric, split) pairs present, metrics in the order of WORDS, unseen scenes (`val`) before held-out combinations."""
    pairs = dict.fromkeys((row["metric"], row["split"]) for folder in folders for row in folder.results)
    known = list(WORDS)

    def order(pair: tuple[str, str]) -> tuple[int, str, bool, str]:
        metric, split = pair
        return (known.index(metric) if metric in known else len(known), metric, split != "val", split)

    return sorted(pairs, key=order)


# --- the pieces -------------------------------------------------------------------------------------------------------------------


def is_share(row: Row) -> bool:
    """Whether a number lies between 0 and 1 by its nature."""
    return words(row["metric"]).share or row["category"] == "usage"


def label(category: str) -> str:
    return LABELS.get(category, category.replace("-", " "))


def figure(value: float | None, row: Row) -> str:
    """A value as it is printed, for a number such as `row`: shares with three decimals, others with what their size needs."""
    if value is None:
        return "—"
    if is_share(row):
        return f"{value:.3f}"
    size = abs(value)
    return short(value) if size >= 10_000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def interval_text(row: Row) -> str:
    if not row.get("interval"):
        return ""
    low, high = row["interval"]
    return f"{figure(low, row)} – {figure(high, row)}"


def strip(row: Row, controls: dict[str, Row | None]) -> Markup | None:
    """The number on the line from 0 to 1, with its interval, its controls and its chance; nothing for no number."""

    def left(value: float) -> str:
        return f"left:{100 * min(1.0, max(0.0, value)):.2f}%"

    if row["value"] is None:
        return None
    marks: list[Markup] = []
    spoken = [figure(row["value"], row)]
    if row.get("interval"):
        low, high = row["interval"]
        marks.append(el("span", {"class": "span", "style": f"{left(low)};width:{100 * max(0.0, min(1, high) - max(0, low)):.2f}%"}))
        spoken.append(f"95 % interval {interval_text(row)}")
    if row.get("chance") is not None:
        marks.append(el("span", {"class": "chance", "style": left(row["chance"]), "title": f"chance {row['chance']:.3f}"}))
        spoken.append(f"chance {row['chance']:.3f}")
    for control, other in controls.items():
        if other is not None and other["value"] is not None:
            said = f"{CONTROLS[control]} {figure(other['value'], row)}"
            marks.append(el("span", {"class": control, "style": left(other["value"]), "title": said}))
            spoken.append(said)
    marks.append(el("span", {"class": "at", "style": left(row["value"]), "title": spoken[0]}))
    return el("div", {"class": "strip", "role": "img", "aria-label": "; ".join(spoken)}, marks)


def legend(folder: Folder) -> Markup | None:
    """What the marks of the headline's strips mean, as far as they occur there."""
    rows = [row for row in headline_rows(folder) if is_share(row) and row["value"] is not None]
    if not rows:
        return None

    def key(kind: str, text: str) -> Markup:
        sample = el("span", {"class": "strip"}, el("span", {"class": kind, "style": "left:50%"}))
        return el("span", {"class": "key"}, sample, text)

    keys = [key("at", "the model, with its 95 % interval")]
    keys += [key(control, said) for control, said in CONTROLS.items() if any(controls_of(folder, row)[control] for row in rows)]
    keys += [key("chance", "chance")] if any(row.get("chance") is not None for row in rows) else []
    return el("div", {"class": "legend", "aria-hidden": "true"}, keys)


def controls_of(folder: Folder, row: Row) -> dict[str, Row | None]:
    """The two controls of a number, None where that control was not made."""
    same = [other for other in folder.results if all(other[name] == row[name] for name in ("metric", "category", "split"))]
    made = [other for other in same if other["value"] is not None]
    return {control: next((other for other in made if other["control"] == control), None) for control in CONTROLS}


def headline_rows(folder: Folder, count: int = 3) -> list[Row]:
    """The numbers that stand for a run: one per metric, its leading category, on `val` where there is one."""
    rows: list[Row] = []
    for metric, split in metrics_of([folder]):
        own = [row for row in folder.results if (row["metric"], row["split"], row["control"]) == (metric, split, None)]
        if own and metric not in {row["metric"] for row in rows}:
            rows.append(next((row for row in own if row["category"] == words(metric).lead), own[0]))
    return rows[:count]


def tiles(folder: Folder) -> Markup | None:
    """Up to three numbers, each with interval and controls."""
    made = []
    for row in headline_rows(folder):
        said, controls = words(row["metric"]), controls_of(folder, row)
        category = "" if row["category"] in ("all", "") else label(row["category"])
        where = " · ".join(part for part in (category, f"n = {row['n']:,}", row["split"]) if part)
        beside: list[Child] = []
        for control, other in controls.items():
            if other is not None:
                beside += [el("dt", {}, CONTROLS[control]), el("dd", {"class": "num"}, figure(other["value"], row))]
        if row.get("chance") is not None:
            beside += [el("dt", {}, "chance"), el("dd", {"class": "num"}, figure(row["chance"], row))]
        unit = el("span", {"class": "unit"}, said.unit) if said.unit else None
        interval = f"95 % interval {interval_text(row)}" if row.get("interval") else "no interval"
        made.append(
            el(
                "div",
                {"class": "tile"},
                el("div", {"class": "what"}, said.title),
                el("div", {"class": "where"}, where),
                el("div", {"class": "value num"}, figure(row["value"], row), unit),
                el("div", {"class": "interval num"}, interval),
                strip(row, controls) if is_share(row) else None,
                el("dl", {}, beside) if beside else None,
            )
        )
    return el("div", {"class": "tiles"}, made) if made else None


def results(folders: list[Folder]) -> list[Markup]:
    """One run: a table per metric, categories down the side. Several: a table per metric and split, a row a run, a column a protocol."""
    evaluated = [folder for folder in folders if folder.results]
    pairs = metrics_of(evaluated)
    if len(evaluated) == 1:
        groups = [(metric, [split for other, split in pairs if other == metric]) for metric in dict.fromkeys(metric for metric, _ in pairs)]
    else:
        groups = [(metric, [split]) for metric, split in pairs]
    parts = []
    for metric, splits in groups:
        columns = [column for split in splits for column in columns_of(evaluated, metric, split)]
        if not columns:
            continue
        said = words(metric)
        on = f" on {' and '.join(split for split in splits if split)}" if any(splits) else ""
        heading = el("h3", {}, said.title, el("span", {"class": "soft"}, on))
        table = tall_table(evaluated[0], metric, columns) if len(evaluated) == 1 else wide_table(evaluated, columns)
        intro = el("p", {"class": "soft small"}, said.says) if said.says else None
        box = el("div", {"class": "scroll", "tabindex": 0}, table)
        parts.append(el("div", {"class": "group"}, heading, intro, box, footnotes(columns)))
    return [*parts, *speeds(evaluated)]


HOW = {"batch": "at once", "threads": "threads", "device": ""}
SPEED = {"encode_per_second": "encoded a second", "decode_per_second": "decoded a second"}


def speeds(folders: list[Folder]) -> list[Markup]:
    """How many pictures a second an image tokenizer encodes and decodes, and under which conditions: a row for each size of picture.

    It is a measurement of a machine, which stands in the log and not among the results. The last one counts.
    """
    body = []
    for folder in folders:
        lines = [line for line in folder.metrics if all(line.get(name) is not None for name in SPEED)]
        for line in {(line.get("height"), line.get("width")): line for line in lines}.values():
            said = [f"{line[name]} {word}".strip() for name, word in HOW.items() if name in line]
            size = f"{line['height']} × {line['width']}" if {"height", "width"} <= line.keys() else ""
            cells = [el("td", {"class": "num"}, f"{line[name]:,.0f}") for name in SPEED]
            body.append(el("tr", {}, el("th", {"scope": "row"}, folder.name), cells, el("td", {}, size), el("td", {}, ", ".join(said))))
    if not body:
        return []
    head = [el("th", {"scope": "col"}, title) for title in ("run", *SPEED.values(), "pixels", "measured with")]
    table = el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body))
    intro = el(
        "p",
        {"class": "soft small"},
        "Pictures through encoder and decoder on the machine of the evaluation. Other machines do not compare.",
    )
    box = el("div", {"class": "scroll", "tabindex": 0}, table)
    return [el("div", {"class": "group"}, el("h3", {}, "Speed"), intro, box)]


def tall_table(folder: Folder, metric: str, columns: list[Column]) -> Markup:
    """One run: a row for each category of each split, with its place on the line from 0 to 1."""
    marks = footnote_marks(columns)
    controls = [control for control in CONTROLS if any((folder.name, control) in column.cells for column in columns)]
    rows = [column.cells[folder.name, None] for column in columns]
    with_interval = any(row.get("interval") for row in rows)
    with_strip = any(is_share(row) for row in rows)
    with_chance = any(row.get("chance") is not None for row in rows)
    head = [el("th", {"scope": "col"}, el("span", {"class": "hidden"}, "category")), el("th", {"scope": "col"}, "score")]
    head.append(el("th", {"scope": "col"}, "95 % interval") if with_interval else Markup())
    head.append(
        el("th", {"class": "strip-cell", "aria-hidden": "true"}, el("span", {}, el("i", {}, "0"), el("i", {}, "1")))
        if with_strip
        else Markup()
    )
    head += [el("th", {"scope": "col"}, CONTROLS[control]) for control in controls]
    head += [el("th", {"scope": "col"}, title) for title in (["chance", "n"] if with_chance else ["n"])]
    width = len([cell for cell in head if cell])
    splits = list(dict.fromkeys(column.split for column in columns))
    one_each = len(splits) == len(columns)  # then a row can be called by its split
    body: list[Markup] = []
    for index, (column, row) in enumerate(zip(columns, rows, strict=True)):
        if len(splits) > 1 and not one_each and (index == 0 or columns[index - 1].split != column.split):
            body.append(el("tr", {"class": "split"}, el("th", {"colspan": width, "scope": "colgroup"}, f"on {column.split}")))
        name = column.split if one_each and column.split else label(column.category)
        others = {control: column.cells.get((folder.name, control)) for control in CONTROLS}
        cells = [
            el("th", {"scope": "row"}, name, mark(marks[column])),
            el("td", {"class": "num score"}, figure(row["value"], row)),
            el("td", {"class": "num interval-cell"}, interval_text(row)) if with_interval else None,
            el("td", {"class": "strip-cell"}, strip(row, others) if is_share(row) else None) if with_strip else None,
            [el("td", {"class": "num soft"}, figure((others[control] or {"value": None})["value"], row)) for control in controls],
            el("td", {"class": "num soft"}, figure(row.get("chance"), row)) if with_chance else None,
            el("td", {"class": "num soft"}, f"{row['n']:,}"),
        ]
        body.append(el("tr", {"class": "total" if column.category == words(metric).lead else None}, cells))
    return el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body))


def glance(folders: list[Folder]) -> Markup | None:
    """Several runs at once: the leading number of every metric, a row a run, a column a protocol."""
    evaluated = [folder for folder in folders if folder.results]
    columns = [column for metric, split in metrics_of(evaluated) for column in columns_of(evaluated, metric, split)]
    leading = [column for column in columns if column.category == (words(column.metric).lead or column.category)]
    if not leading:
        return None
    titles = {column: words(column.metric).title + (f", {column.split}" if column.split else "") for column in leading}
    return el("div", {"class": "scroll", "tabindex": 0}, wide_table(evaluated, leading, titles))


def wide_table(folders: list[Folder], columns: list[Column], titles: dict[Column, str] | None = None) -> Markup:
    """Several runs: a row for each, and for each of its controls; a column for each category and protocol."""
    marks = footnote_marks(columns)
    head = [el("th", {"scope": "col"}, "run")]
    said = {column: titles[column] if titles else label(column.category) for column in columns}
    head += [el("th", {"scope": "col"}, said[column], mark(marks[column])) for column in columns]
    body = []
    for folder in folders:
        for control in (None, *CONTROLS):
            if not any((folder.name, control) in column.cells for column in columns):
                continue
            who = folder.name if control is None else CONTROLS[control]
            cells = []
            for column in columns:
                row = column.cells.get((folder.name, control))
                interval = el("span", {"class": "interval"}, interval_text(row)) if row and control is None else None
                cells.append(el("td", {"class": "num"}, figure(row["value"], row) if row else "", interval))
            sampled = sampling_text(folder) if control is None else ""
            title = el("th", {"scope": "row"}, who, el("span", {"class": "interval"}, sampled) if sampled else None)
            body.append(el("tr", {"class": "control" if control else None}, title, cells))
    chances = [next((row for row in column.cells.values() if row.get("chance") is not None), None) for column in columns]
    if any(row is not None for row in chances):
        cells = [el("td", {"class": "num"}, figure(row["chance"], row) if row is not None else "") for row in chances]
        body.append(el("tr", {"class": "control"}, el("th", {"scope": "row"}, "chance"), cells))
    return el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body))


def sampling_text(folder: Folder) -> str:
    """Guidance, steps and seed of the samples a run was judged by: part of its name."""
    found = [row["protocol"]["sampling"] for row in folder.results if row.get("protocol", {}).get("sampling")]
    said = []
    for port, settings in found[0].items() if found else []:
        if isinstance(settings, dict):
            words = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if not isinstance(value, dict | list)]
            said.append(f"{port}: {', '.join(words)}")
        else:
            said.append(f"{port} {settings}")
    return "; ".join(said)


def footnote_marks(columns: list[Column]) -> dict[Column, str]:
    """A letter for every protocol of a category that was measured in more than one way; nothing where all agree."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for column in columns:
        same.setdefault((column.metric, column.split, column.category), []).append(column.protocol)
    marks = {}
    for column in columns:
        protocols = same[column.metric, column.split, column.category]
        marks[column] = "abcdefghijklmnopqrstuvwxyz"[protocols.index(column.protocol) % 26] if len(protocols) > 1 else ""
    return marks


def mark(letter: str) -> Markup | None:
    return el("sup", {}, letter) if letter else None


def footnotes(columns: list[Column]) -> Markup:
    """How the numbers were measured: one line that all share, or one per split and footnote letter."""
    marks = footnote_marks(columns)
    several_splits = len({column.split for column in columns}) > 1
    lines: dict[tuple[str, str], None] = {}
    for column in columns:
        names = [marks[column], column.split if several_splits else ""]
        protocol = next(iter(column.cells.values())).get("protocol", {})
        lines.setdefault((" ".join(name for name in names if name), protocol_text(protocol)))
    several = any(marks.values())
    title = "How this was measured" + (": in several ways, which do not compare" if several else "")
    items = [el("li", {}, f"{name}: " if name else "", text) for name, text in lines]
    return el("details", {"class": "protocol", "open": several}, el("summary", {}, title), el("ul", {}, items))


def protocol_text(protocol: dict[str, Any]) -> str:
    def said(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        return text[:12] + "…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text

    measured = {name: value for name, value in protocol.items() if name != "sampling"}
    return "; ".join(f"{name.replace('_', ' ')}: {said(value)}" for name, value in measured.items()) or "nothing recorded"
