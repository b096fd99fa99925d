"""95 % intervals: Wilson's for a share of independent trials, a bootstrap over samples for everything else.

Objects of one picture and questions about one picture stand or fall together, so the bootstrap draws *samples*, not objects.
These intervals speak about the evaluation set: they say nothing about another training seed.
"""

import math

import numpy as np

Z95 = 1.959963984540054


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927). Stays inside [0, 1] and has width even at 0 of n and n of n."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"wilson: {successes} successes of {trials} trials")
    share, z2 = successes / trials, Z95 * Z95
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    return low, 1.0 if successes == trials else centre + half


def bootstrap_ratio(parts: np.ndarray, wholes: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, float] | None:
    """Percentile bootstrap of sum(parts) / sum(wholes) over samples; both (n,). A mean is the case wholes = 1.

    None for fewer than two samples, where there is nothing to draw from.
    """
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if parts.shape != wholes.shape or parts.ndim != 1:
        raise ValueError(f"bootstrap_ratio: parts {parts.shape} and wholes {wholes.shape} should be equally long vectors")
    n = len(parts)
    if n < 2 or wholes.sum() == 0:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    chunk = max(1, 4_000_000 // n)  # at most 32 MB of indices at a time
    for start in range(0, draws, chunk):
        chosen = generator.integers(0, n, (min(chunk, draws - start), n))
        whole = wholes[chosen].sum(1)
        drawn = whole > 0  # a draw in which nothing was there to be judged has no ratio
        ratios.append(parts[chosen].sum(1)[drawn] / whole[drawn])
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_share(parts: np.ndarray, wholes: np.ndarray, seed: int) -> tuple[float, float] | None:
    """`bootstrap_ratio` of parts that are contained in their wholes. Where all or nothing is right, every draw agrees and the bootstrap
    would claim certainty; Wilson's interval over the samples takes its place."""
    right, total = int(np.sum(parts)), int(np.sum(wholes))
    if total and right in (0, total):
        samples = int((np.asarray(wholes) > 0).sum())
        return wilson(samples if right else 0, samples)
    return bootstrap_ratio(parts, wholes, seed)


def bootstrap_mean(values: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean of values (n,)."""
    values = np.asarray(values, np.float64)
    return bootstrap_ratio(values, np.ones_like(values), seed)
