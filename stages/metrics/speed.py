"""How many a second: a clock, so never part of results.json, which is the same for the same inputs.

Kept in metrics.jsonl with everything that must be equal before two speeds may be compared: batch, size, threads, device.
"""

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

SECONDS = 0.5  # of measuring; a single pass may take longer


def per_second(work: Callable[[], Tensor], count: int, seconds: float = SECONDS) -> float:
    """Things a second when `work` does `count` of them: the median over passes that take `seconds` together, after one to warm up."""
    times: list[float] = []
    finish(work())
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        finish(work())
        times.append(time.perf_counter() - start)
    return count / float(np.median(times))


def finish(result: Tensor) -> None:
    """Wait for a device that works on its own."""
    result.flatten()[:1].cpu()
