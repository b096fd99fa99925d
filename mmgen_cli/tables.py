"""The table `mmgen recipes` prints: one line a system, its sizes, and what a test has proved about it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmgen_cli.door import print_json
from stages.escape import visible
from stages.terminal import put

RUNGS = {True: "yes", False: "no", None: "-"}
LEGEND = """
described: the recipe loads and can be drawn · sized: it has the published parameter count · learns: it overfits a batch and gives it back
agrees: equal to a public reference class · works: beats a stated score on held-out prompts · -: does not apply, or was not tested"""


def print_recipes(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Prints `stages.ladder.table()`: as it is for programs, or with aligned columns for people."""
    if as_json:
        print_json(list(rows))
        return
    header = ["name", "family", "paper", "tiny", "small", "as published", *(rows[0]["rungs"] if rows else [])]
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        put(visible("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()))
    put(LEGEND)


def _cells(row: Mapping[str, Any]) -> list[str]:
    sizes = row["parameters"]
    published = short_count(sizes["paper"]) + (f" of {short_count(sizes['published'])}" if sizes.get("published") else "")
    counts = [short_count(sizes["tiny"]), short_count(sizes["small"]), published]
    return [row["name"], row["family"], str(row["paper"]), *counts, *(RUNGS[rung] for rung in row["rungs"].values())]


def short_count(count: float | None) -> str:
    """1234567 → 1.2M; a dash for None."""
    if count is None:
        return "-"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{2 if letter == 'B' else 1}f}{letter}"
    return f"{count:.0f}"
