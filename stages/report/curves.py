"""What happened while training: one chart per loss, runs laid over each other, validation dashed; then the health of the run.

metrics.jsonl is read as it is: every number is a curve over `step`. `val/PORT` shares the chart of `loss/PORT`, so that a gap between
the two is seen; other numbers measured on validation data stand alone.
"""

from collections import defaultdict
from collections.abc import Sequence

from stages.report.chart import Line, line_chart
from stages.report.folders import Folder, number
from stages.report.html import Markup, el

LARGEST = 1e100  # what can be drawn; neither infinite nor no number
WHEN = ("step", "samples", "tokens", "seconds")  # numbers that say when, rather than how it went


def curves(folders: Sequence[Folder]) -> list[Markup]:
    """Charts of every folder that has metrics: losses first, with a switch between linear and logarithmic, then the rest."""
    trained = [folder for folder in folders if any(number(line.get("step")) is not None for line in folder.metrics)]
    if not trained:
        return []
    charts: dict[str, list[Line]] = defaultdict(list)
    for tone, folder in enumerate(trained):
        names = dict.fromkeys(name for line in folder.metrics for name in line if name not in WHEN)
        for name in names:
            read = ((number(line.get("step")), number(line.get(name))) for line in folder.metrics)
            points = [(step, value) for step, value in read if step is not None and value is not None]
            held_out = name.startswith("val/")
            label = " ".join(part for part in (folder.name if len(trained) > 1 else "", "validation" if held_out else "training") if part)
            if len({value for _, value in points}) > 1:  # what never changes has no curve
                steps, values = zip(*points, strict=True)
                port = "loss/" + name.removeprefix("val/")
                charts[port if held_out and port in names else name].append(Line(label, steps, values, tone, held_out))
    losses = {name: lines for name, lines in charts.items() if "loss" in name}
    health = {name: lines for name, lines in charts.items() if name not in losses}
    parts: list[Markup] = []
    if losses:
        shown = [loss_chart(name, lines) for name, lines in losses.items()]
        linear = el("input", {"type": "radio", "name": "scale", "id": "linear", "class": "toggle first", "checked": True})
        log = el("input", {"type": "radio", "name": "scale", "id": "log", "class": "toggle second"})
        switch = [linear, el("label", {"for": "linear"}, "Linear"), log, el("label", {"for": "log"}, "Logarithmic")]
        parts.append(el("div", {"class": "group"}, switch, el("div", {"class": "charts"}, shown)))
        parts.append(key([line for lines in losses.values() for line in lines]))
    if health:
        boxes = [chart_box(spoken(name), line_chart(spoken(name), lines), ends(lines)) for name, lines in health.items()]
        parts += [el("h3", {}, "How the run went"), el("div", {"class": "charts"}, boxes)]
    return parts


def loss_chart(name: str, lines: list[Line]) -> Markup:
    title = spoken(name)
    both = [
        el("div", {"class": "as-linear"}, line_chart(title, lines)),
        el("div", {"class": "as-log"}, line_chart(title, lines, log=True)),
    ]
    return chart_box(title, both, ends(lines))


def chart_box(title: str, drawing: Markup | list[Markup], beside: str = "") -> Markup:
    heading = el("h3", {}, title, el("span", {"class": "soft num"}, beside) if beside else None)
    return el("div", {"class": "chart"}, heading, drawing)


def ends(lines: list[Line]) -> str:
    """Where the curves of a single run end, training then validation."""
    if len({line.tone for line in lines}) > 1:
        return ""
    return ", ".join(f"{'val ' if line.dashed else ''}{line.values[-1]:.4g}" for line in lines)


def key(lines: list[Line]) -> Markup:
    """Which colour is which run, and what dashes mean; nothing where there is nothing to tell apart."""
    names = dict.fromkeys((line.name, line.tone, line.dashed) for line in lines)
    swatches = [
        el("span", {"class": "key"}, el("span", {"class": f"swatch s{tone % 6}" + (" dashed" if dashed else "")}), name)
        for name, tone, dashed in sorted(names, key=lambda entry: (entry[1], entry[2]))
    ]
    return el("div", {"class": "legend"}, swatches) if len(names) > 1 else Markup()


def spoken(name: str) -> str:
    """`loss/draw` → "Loss: draw", `val/psnr` → "Validation: psnr", `lr` → "Learning rate"."""
    head, _, rest = name.partition("/")
    said = {"lr": "Learning rate", "val": "Validation"}.get(head, head.replace("_", " ").capitalize())
    return f"{said}: {rest.replace('_', ' ')}" if rest else said
