"""Differences between designs over training seeds: Student's t for pairs, and Holm's correction for many of them.

Two designs trained with the same seed share their data's order and the prompts they are scored on, so a seed gives one difference. With
few seeds a bootstrap over seeds, or an interval over evaluation items alone, claims far more than it knows; the t-interval does not.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """The mean difference, half the width of its 95 % interval, and the two-sided p-value of no difference at all."""

    mean: float
    half: float
    p: float


def paired(ones: Sequence[float], others: Sequence[float]) -> Difference:
    """ones - others, seed by seed (Student 1908). ValueError for fewer than two seeds, or for different numbers of them."""
    if len(ones) != len(others) or len(ones) < 2:
        raise ValueError(f"paired: {len(ones)} and {len(others)} values; two seeds or more, the same for both")
    differences = [one - other for one, other in zip(ones, others, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    freedom = len(differences) - 1
    if error == 0.0:
        return Difference(mean, 0.0, 1.0 if mean == 0.0 else 0.0)
    return Difference(mean, t_quantile(freedom) * error, tails(mean / error, freedom))


def tails(t: float, freedom: int) -> float:
    """P(|T| > |t|) for an integer number of degrees of freedom, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return max(0.0, 1.0 - inside)


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """What |T| exceeds with probability 1 - level."""
    low, high = 0.0, 1.0
    while tails(high, freedom) > 1 - level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tails(middle, freedom) > 1 - level else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those below 0.05 are real together, but for a chance of 0.05 that any is not (Holm 1979)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
