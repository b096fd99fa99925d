"""Charts as inline SVG: lines over steps, sorted bars. Sized for the column they stand in, so that their text stays readable.

Colours are classes (`s0` … `s5`) that the page's style sheet gives for light and dark. Every mark carries a <title>, which browsers
show on hover and screen readers read out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stages.report.html import Markup, el

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
SMALLEST = 1e-100  # a difference, or a value with a logarithm, below which nothing is drawn
MAX_POINTS = 160  # more than the pixels can show


@dataclass(frozen=True)
class Line:
    """One series: steps and values of equal length; `tone` picks its colour, `dashed` marks validation."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    tone: int = 0
    dashed: bool = False


def line_chart(title: str, lines: Sequence[Line], *, log: bool = False) -> Markup:
    """Values over steps. `log` draws the logarithm; a value that is not positive has none and is left out."""
    series = [(line, thin([(s, v) for s, v in zip(line.steps, line.values, strict=True) if v > SMALLEST or not log])) for line in lines]
    points = [point for _, kept in series for point in kept]
    if not points:
        return el("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": f"{title}: nothing to draw"}, "")
    steps, values = [point[0] for point in points], [point[1] for point in points]
    low_step, high_step = min(steps), max(steps)
    if log:
        value_ticks = log_ticks(min(values), max(values))
    else:
        value_ticks = ticks(min(values), max(values), 4)
    low, high = min(value_ticks[0], *values), max(value_ticks[-1], *values)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - low_step) / (high_step - low_step) if high_step > low_step else 0.5)

    def y(value: float) -> float:
        scale = math.log if log else float
        share = (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    marks: list[Markup] = []
    for tick in value_ticks:
        marks.append(el("line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{y(tick):.1f}", "y2": f"{y(tick):.1f}"}))
        marks.append(el("text", {"x": LEFT - 6, "y": f"{y(tick) + 3.5:.1f}", "text-anchor": "end"}, short(tick)))
    marks.append(el("text", {"x": LEFT, "y": HEIGHT - BOTTOM + 16}, "step"))
    for tick in ticks(low_step, high_step, 4) if high_step > low_step else [low_step]:
        if x(tick) > LEFT + 34 and tick <= high_step:
            anchor = "end" if x(tick) > WIDTH - RIGHT - 14 else "middle"
            marks.append(el("text", {"x": f"{x(tick):.1f}", "y": HEIGHT - BOTTOM + 16, "text-anchor": anchor}, short(tick)))
    for line, kept in series:
        if not kept:
            continue
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in kept)
        tone = f"line s{line.tone % 6}" + (" dashed" if line.dashed else "")
        last_step, last = kept[-1]
        ends = f"{line.name}: {short(last)} at step {short(last_step)}"
        marks.append(el("polyline", {"class": tone, "points": path}, el("title", {}, ends)))
        for step, value in kept[:: max(1, len(kept) // 40)]:  # invisible targets for hovering
            marks.append(dot(f"dot target s{line.tone % 6}", x(step), y(value), 5, f"{line.name}, step {short(step)}: {short(value)}"))
        marks.append(dot(f"dot s{line.tone % 6}", x(last_step), y(last), 2.5, ends))
    spoken = ", ".join(f"{line.name} ends at {short(kept[-1][1])}" for line, kept in series if kept)
    return el("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": f"{title} over steps: {spoken}"}, marks)


def dot(style: str, x: float, y: float, radius: float, title: str) -> Markup:
    return el("circle", {"class": style, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": radius}, el("title", {}, title))


def sorted_bars(title: str, counts: Sequence[int]) -> Markup:
    """Counts, most frequent first, as one area against the flat line of equal use; the empty tail stays visible."""
    ordered = sorted(counts, reverse=True)
    total, size, used = sum(ordered), len(ordered), sum(count > 0 for count in ordered)
    peak, across = max(1, ordered[0]), WIDTH - LEFT - RIGHT
    columns = min(size, across)  # one bar a pixel at most; a bar is the mean of the codes it stands for
    edges = [round(column * size / columns) for column in range(columns + 1)]
    heights = [sum(ordered[a:b]) / (b - a) for a, b in pairwise(edges)]

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * count / peak

    marks: list[Markup] = []
    for tick in ticks(0, peak, 3):
        if tick <= peak:
            marks.append(el("line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{y(tick):.1f}", "y2": f"{y(tick):.1f}"}))
            marks.append(el("text", {"x": LEFT - 6, "y": f"{y(tick) + 3.5:.1f}", "text-anchor": "end"}, short(tick)))
    outline = f"M{LEFT},{HEIGHT - BOTTOM}" + "".join(f"V{y(h):.1f}H{LEFT + (i + 1) * across / columns:.1f}" for i, h in enumerate(heights))
    marks.append(el("path", {"class": "area s0", "d": outline + f"V{HEIGHT - BOTTOM}Z"}, el("title", {}, f"{used} of {size} codes occur")))
    equal = y(total / size)
    equal_line = {"class": "equal", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": f"{equal:.1f}", "y2": f"{equal:.1f}"}
    marks.append(el("line", equal_line, el("title", {}, f"equal use: {short(total / size)} tokens a code")))
    marks.append(el("text", {"x": WIDTH - RIGHT, "y": f"{equal - 5:.1f}", "text-anchor": "end"}, "equal use"))
    for tick in [0, *(t for t in ticks(0, size, 4) if 0 < t < size * 0.9), size]:
        anchor = "start" if tick == 0 else "end" if tick == size else "middle"
        place = f"{LEFT + across * tick / size:.1f}"
        marks.append(el("text", {"x": place, "y": HEIGHT - BOTTOM + 16, "text-anchor": anchor}, short(tick)))
    label = f"{title}: {used} of {size} codes occur in {total} tokens"
    return el("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label}, marks)


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS, each the mean of a run of neighbours; the first and the last stay what they were."""
    if len(points) <= MAX_POINTS:
        return points
    inner, kept = points[1:-1], [points[0]]
    size = math.ceil(len(inner) / (MAX_POINTS - 2))
    for start in range(0, len(inner), size):
        run = inner[start : start + size]
        kept.append((sum(step for step, _ in run) / len(run), sum(value for _, value in run) / len(run)))
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]."""
    if high - low <= SMALLEST:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 12) for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them while that gives few enough, that span [low, high]; both positive."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1,)):
        marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        start = max((index for index, mark in enumerate(marks) if mark <= low), default=0)
        end = next((index for index, mark in enumerate(marks) if mark >= high), len(marks) - 1)
        if end - start < 7:
            break
    return marks[start : end + 1]


def short(number: float) -> str:
    """A number in a few characters: 12k, 0.031, 1.2M, 3e-05."""
    size = abs(number)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{number / (1e3 if name == 'k' else unit):.3g}{name}"
    if size >= 1000:
        return f"{number:.0f}"
    return f"{number:.3g}"
