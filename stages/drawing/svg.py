"""A little SVG: elements as text, the width of a line before anybody renders it, the colours and the marks.

Every class begins with `mmd-`, every rule is scoped to `svg.mmd`, and ids carry a prefix made from the drawing, so a drawing can stand
inline in any page without either one changing the other. Light and dark follow the reader's setting.
"""

from collections.abc import Iterable
from typing import Literal

from stages.escape import Child, Markup, markup_text, render

NARROW, WIDE = frozenset("iljtfrI.,:;'|! ()[]-/·"), frozenset("mwMW%@—→<>+=~“”")
Font = Literal["sans", "mono", "bold"]
MONO_WIDTH = 0.61  # of the font size, in every common monospaced face or a little less
PORT_COLOURS = 6
EXPERT_COLOURS = 4

STYLE = (
    """
svg.mmd { --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --soft: #66635d; --rule: #e3e0d8; --wash: #f1efe9; --faint: #c9c5bb;
  --hot: #c4471b; --cold: #2d6fb5;
  --p0: #2353c4; --p1: #c2600c; --p2: #18845a; --p3: #7a48bd; --p4: #0b7f8f; --p5: #b8326b;
  --e0: #56657a; --e1: #94691d; --e2: #3f7a5f; --e3: #8a4a72; --on: #ffffff;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-size: 12px; }
@media (prefers-color-scheme: dark) { svg.mmd { --paper: #141519; --card: #1c1e23; --ink: #eae8e2; --soft: #a5a29a; --rule: #32353c;
  --wash: #24262c; --faint: #565a63; --hot: #ff9a70; --cold: #86bdf5;
  --p0: #8fb0ff; --p1: #f5a35c; --p2: #5fce97; --p3: #c3a1f5; --p4: #5fcbd8; --p5: #f58db5;
  --e0: #93a3ba; --e1: #d3ab5e; --e2: #86c2a6; --e3: #d392bb; --on: #141519; } }
svg.mmd text { fill: var(--ink); stroke: none; }
svg.mmd .mmd-soft { fill: var(--soft); } svg.mmd .mmd-bold { font-weight: 640; } svg.mmd .mmd-end { text-anchor: end; }
svg.mmd .mmd-mid { text-anchor: middle; } svg.mmd .mmd-on { fill: var(--on); } svg.mmd .mmd-tone { fill: var(--tone); }
svg.mmd .mmd-mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; }
svg.mmd .mmd-paper { fill: var(--paper); } svg.mmd .mmd-card { fill: var(--card); stroke: var(--rule); }
svg.mmd .mmd-wash { fill: var(--wash); } svg.mmd .mmd-box { fill: var(--wash); stroke: var(--faint); }
svg.mmd .mmd-line { fill: none; stroke: var(--rule); } svg.mmd .mmd-arrow { fill: none; stroke: var(--soft); stroke-width: 1.2; }
svg.mmd .mmd-bracket { fill: none; stroke: var(--faint); stroke-width: 1.2; }
svg.mmd .mmd-given { fill: var(--tone); fill-opacity: .13; stroke: var(--tone); stroke-opacity: .55; }
svg.mmd .mmd-predicted { fill: var(--tone); stroke: var(--tone); } svg.mmd .mmd-chevron { fill: none; stroke: var(--tone); stroke-width: 1.6; }
svg.mmd .mmd-hidden { fill: var(--card); stroke: var(--tone); stroke-dasharray: 2.5 2; }
svg.mmd .mmd-noisy { stroke: var(--tone); } svg.mmd .mmd-grain { fill: var(--tone); }
svg.mmd .mmd-goal { fill: none; stroke: var(--tone); stroke-width: 1.4; }
svg.mmd .mmd-lane { fill: var(--lane); fill-opacity: .1; } svg.mmd .mmd-busy { fill: var(--lane); fill-opacity: .85; }
svg.mmd .mmd-own { fill: var(--tone); } svg.mmd .mmd-earlier { fill: var(--tone); fill-opacity: .42; }
svg.mmd .mmd-mesh { fill: none; stroke: var(--card); } svg.mmd .mmd-cut { fill: none; stroke: var(--soft); stroke-opacity: .55; }
svg.mmd .mmd-flame { fill: var(--hot); } svg.mmd .mmd-snow { fill: none; stroke: var(--cold); stroke-linecap: round; }
"""
    + "".join(f"svg.mmd .mmd-p{i} {{ --tone: var(--p{i}); }}\n" for i in range(PORT_COLOURS))
    + "".join(f"svg.mmd .mmd-e{i} {{ --lane: var(--e{i}); }}\n" for i in range(EXPERT_COLOURS))
)


def width_of(text: str, size: float = 12, font: Font = "sans") -> float:
    """Pixels a line may take, on the generous side, so that nothing is ever cut or overlapped in another font."""
    if font == "mono":
        return len(text) * size * MONO_WIDTH
    units = sum(0.36 if letter in NARROW else 0.95 if letter in WIDE else 0.72 if letter.isupper() else 0.6 for letter in text)
    return units * size * (1.16 if font == "bold" else 1.0)


def wrap(text: str, limit: float, size: float = 12, font: Font = "sans") -> list[str]:
    """Lines of at most `limit` pixels; a word that is longer by itself is broken between letters."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer, size, font) <= limit:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and width_of(lines[-1] + letter, size, font) > limit:
                lines.append("")
            lines[-1] += letter
    return lines


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def el(name: str, content: Child = None, /, **attributes: float | str) -> Markup:
    """One element; content that is no Markup is escaped. Attribute names are Python's: `data_task` is data-task, `class_` is class."""
    pairs = (
        (key.rstrip("_").replace("_", "-"), number(value) if isinstance(value, int | float) else markup_text(value))
        for key, value in attributes.items()
        if value != ""
    )
    opened = name + "".join(f' {key}="{value}"' for key, value in pairs)
    inside = render(content)
    return Markup(f"<{opened}>{inside}</{name}>" if inside else f"<{opened}/>")


def text(x: float, y: float, words: str, kind: str = "", size: float = 12) -> Markup:
    """A line whose baseline starts at (x, y); `kind`: classes without their prefix."""
    return el("text", words, x=x, y=y, font_size=size, class_=classes(kind))


def rect(x: float, y: float, w: float, h: float, kind: str, r: float = 0, title: str = "") -> Markup:
    """A rectangle with rounded corners and, if asked for, a tooltip."""
    return el("rect", el("title", title) if title else None, x=x, y=y, width=w, height=h, rx=r, class_=classes(kind))


def path(d: str, kind: str, **more: float | str) -> Markup:
    return el("path", d=d, class_=classes(kind), **more)


def group(content: Iterable[Child], **attributes: float | str) -> Markup:
    return el("g", content, **attributes)


def moved(content: Iterable[Child], x: float, y: float, kind: str = "") -> Markup:
    """The same, somewhere else."""
    return group(content, transform=f"translate({number(x)} {number(y)})", class_=classes(kind))


def classes(kind: str) -> str:
    return " ".join(f"mmd-{word}" for word in kind.split())


def up(x: float, bottom: float, top: float) -> Markup:
    """A small arrow from below to above."""
    return path(f"M{number(x)} {number(bottom)}V{number(top + 1)}m-3 3.5l3 -3.5l3 3.5", "arrow")


def flame(x: float, y: float, size: float = 13) -> Markup:
    """Learns. (x, y): top left."""
    shape = "M8 1C9 4 12.6 5.8 12.6 10a4.6 4.9 0 0 1-9.2 0C3.4 7.6 4.8 6.6 5.2 4.6 6.4 5.2 7 6 7.2 7 8.2 5.4 8.4 3.2 8 1Z"
    return moved([path(shape, "flame", transform=f"scale({number(size / 15)})")], x, y)


def snowflake(x: float, y: float, size: float = 13) -> Markup:
    """Frozen. (x, y): top left."""
    arm = "M7.5 7.5V.9M5.7 2.3l1.8 1.7 1.8-1.7"
    arms = [path(arm, "snow", transform=f"rotate({60 * turn} 7.5 7.5)") for turn in range(6)]
    return moved([group(arms, transform=f"scale({number(size / 15)})", stroke_width=1.25)], x, y)
