"""Answers to questions about a picture, per type of question, beside what a constant answer reaches.

`sample.qa` is a list of {"question", "answer", "truth", "type"}, the model's answer beside the true one. An answer is right when it is
the same words; case, surrounding space and a final full stop do not count. Chance is the share of the most frequent true answer of
that type: what a model reaches that never looks at the picture and always says the same. Several questions share a picture, so
intervals draw pictures, not questions.
"""

from collections import Counter, defaultdict

import numpy as np

from stages.errors import DataError
from stages.metrics.intervals import bootstrap_share
from stages.metrics.score import Fields, Score, Setting


class QuestionAccuracy:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return "sample.qa" in sample

    def look(self, sample: Fields) -> dict[str, list[str]]:
        return by_type(sample, "answer")

    def expect(self, sample: Fields) -> dict[str, list[str]]:
        return by_type(sample, "truth")

    def scores(self, seen: list[dict[str, list[str]]], expected: list[dict[str, list[str]]]) -> list[Score]:
        """The k-th answer of a type is held against the k-th truth of that type; in the shuffled control, of another picture."""
        right: dict[str, list[int]] = defaultdict(list)  # per type, one entry a sample: how many were right ...
        asked: dict[str, list[int]] = defaultdict(list)  # ... of how many
        truths: dict[str, Counter[str]] = defaultdict(Counter)
        for answers, trues in zip(seen, expected, strict=True):
            all_right = all_asked = 0
            for kind in answers.keys() & trues.keys():
                pairs = list(zip(answers[kind], trues[kind], strict=False))
                right[kind].append(sum(answer == true for answer, true in pairs))
                asked[kind].append(len(pairs))
                truths[kind].update(true for _, true in pairs)
                all_right, all_asked = all_right + right[kind][-1], all_asked + len(pairs)
            if all_asked:
                right["all"].append(all_right)
                asked["all"].append(all_asked)
        most_frequent = {kind: counts.most_common(1)[0][1] for kind, counts in sorted(truths.items())}
        most_frequent = {"all": sum(most_frequent.values())} | most_frequent  # the best constant answer to each type
        protocol = {"match": "same words", "chance": "most frequent true answer of the type"}
        scores = []
        for kind in most_frequent if truths else []:
            n, interval = sum(asked[kind]), bootstrap_share(np.array(right[kind]), np.array(asked[kind]), self.seed)
            scores.append(Score(kind, sum(right[kind]) / n, n, len(asked[kind]), interval, most_frequent[kind] / n, protocol))
        return scores


def by_type(sample: Fields, what: str) -> dict[str, list[str]]:
    """The answers, or the truths, of a sample's questions, in order, under each type of question."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for entry in sample["sample.qa"]:
        missing = {"question", "answer", "truth", "type"} - entry.keys()
        if missing:
            raise DataError(f"sample.qa: an entry lacks {', '.join(sorted(missing))}: {entry}")
        grouped[entry["type"]].append(plain(entry[what]))
    return grouped


def plain(answer: str) -> str:
    """What of an answer has to agree: its words."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()
