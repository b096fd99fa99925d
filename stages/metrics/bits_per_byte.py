"""Bits per byte of the true text under the model: how well it predicts words, whatever its tokenizer.

`sample.likelihood` is a list of {"task", "nats", "bytes"}: the cross-entropy of the true text as the task's target, summed in nats
over its tokens (its end token included), and the bytes of that text. Tasks that show the model a picture first and tasks that do
not are separate categories; the difference is what looking at the picture is worth.
"""

import math
from collections import defaultdict

import numpy as np

from stages.metrics.intervals import bootstrap_ratio
from stages.metrics.score import Fields, Score, Setting


class BitsPerByte:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return "sample.likelihood" in sample

    def look(self, sample: Fields) -> list[tuple[str, float, int]]:
        return [(entry["task"], float(entry["nats"]), int(entry["bytes"])) for entry in sample["sample.likelihood"]]

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[list[tuple[str, float, int]]], expected: list[None]) -> list[Score]:
        nats: dict[str, list[float]] = defaultdict(list)
        size: dict[str, list[int]] = defaultdict(list)
        for entries in seen:
            for task, value, count in entries:
                nats[task].append(value)
                size[task].append(count)
        scores = []
        for task in nats:
            bits, total = np.array(nats[task]) / math.log(2), np.array(size[task])
            interval = bootstrap_ratio(bits, total, self.seed)
            scores.append(
                Score(task, float(bits.sum() / total.sum()), int(total.sum()), len(total), interval, None, {"end token": "included"})
            )
        return scores
