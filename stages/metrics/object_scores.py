"""The scores that drawn pictures and written captions share: which of the objects that were meant are there.

An object is right when all its attributes and its place are. Recall is right / meant, which is the object accuracy; precision is
right / there, so that extra objects cost; a scene is right when nothing is wrong, missing or extra.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.data.scenes import Scene, compare
from stages.metrics.intervals import bootstrap_share, wilson
from stages.metrics.score import Score


def object_scores(meant: Sequence[Scene], there: Sequence[Scene], seed: int, protocol: dict[str, Any]) -> list[Score]:
    """Recall, precision, whole scenes, and the share of the meant objects that have each attribute right, over pairs of scenes.

    Intervals draw pictures, since the objects of one picture are not independent; whole scenes have Wilson's.
    """
    pairs = [compare(one, other) for one, other in zip(meant, there, strict=True)]
    samples = len(pairs)

    def ratio(category: str, parts: list[int], wholes: list[int]) -> Score:
        total = sum(wholes)
        interval = bootstrap_share(np.array(parts), np.array(wholes), seed)
        return Score(category, sum(parts) / total if total else 0.0, total, samples, interval, protocol=protocol)

    right, wanted = [pair.right for pair in pairs], [pair.meant for pair in pairs]
    scores = [
        ratio("objects", right, wanted),
        ratio("objects-precision", right, [pair.drawn for pair in pairs]),
        share("scenes", [pair.exact for pair in pairs], protocol),
        ratio("object-place", [sum(entry.found for entry in pair.objects) for pair in pairs], wanted),
    ]
    named = {attribute for scene in meant for attribute in scene.row.named if attribute != "place"}
    for attribute in sorted(named):
        scores.append(ratio(f"object-{attribute}", [sum(getattr(entry, attribute) for entry in pair.objects) for pair in pairs], wanted))
    return scores


def share(category: str, outcomes: Sequence[bool], protocol: dict[str, Any]) -> Score:
    """The share of samples of which something holds, with Wilson's interval."""
    n, successes = len(outcomes), sum(outcomes)
    return Score(category, successes / n, n, n, wilson(successes, n), protocol=protocol)
