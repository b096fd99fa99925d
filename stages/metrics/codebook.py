"""How much of its codebook an image tokenizer uses: the share of codes that occur, and the perplexity of their frequencies.

usage = |{codes that occur}| / K and perplexity = exp(H(p)), between 1 (one code for everything) and K (all codes equally often).
Neither can exceed tokens / K, so the number of tokens stands beside both.
"""

import numpy as np

from stages.errors import DataError
from stages.metrics.score import Fields, Score, Setting


def usage(counts: np.ndarray) -> float:
    """Share of the codes that occur at all; counts (K,)."""
    return float((counts > 0).mean())


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy (in nats) of the codes' frequencies; counts (K,), at least one of them positive."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))


class Codebook:
    paired = False

    def __init__(self, setting: Setting) -> None:
        assert setting.codebook_size is not None  # applies() asked for it
        self.size = setting.codebook_size

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return "sample.image.codes" in sample and setting.codebook_size is not None

    def look(self, sample: Fields) -> np.ndarray:
        """The codes of one picture, flat."""
        codes = np.asarray(sample["sample.image.codes"]).ravel()
        if codes.size == 0 or codes.min() < 0 or codes.max() >= self.size:
            raise DataError(f"sample.image.codes: {codes.size} codes, which should be integers from 0 to {self.size - 1}")
        return codes

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[np.ndarray], expected: list[None]) -> list[Score]:
        counts = np.bincount(np.concatenate(seen), minlength=self.size)
        tokens, protocol = int(counts.sum()), {"codebook_size": self.size}
        return [
            Score("usage", usage(counts), tokens, len(seen), protocol=protocol),
            Score("perplexity", perplexity(counts), tokens, len(seen), protocol=protocol),
        ]
