"""Which sample stands at which place of a stream: a function of (data, seed, place) alone, worked out where it is asked for.

Nothing before a place has to be replayed to know what stands there, so a resume starts anywhere as fast as at the beginning. Each data
set is gone through in an order of its own, a new one every epoch. Of several with weights, every BLOCK places hold each set as often as its
weight says, in an order that depends on (seed, block).
"""

from collections.abc import Sequence

import numpy as np
import torch

from stages.training.seeds import stream_seed

BLOCK = 1024


class Order:
    """sets: the sample numbers of each data set, and its weight. `at(place)` gives the epoch of its set, and the sample's number."""

    def __init__(self, sets: Sequence[tuple[range, float]], *seed: object) -> None:
        self.sets = [numbers for numbers, _ in sets]
        self.seed = seed
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._blocks: dict[int, np.ndarray] = {}
        self._quota = _quota([weight for _, weight in sets])

    def at(self, place: int) -> tuple[int, int]:
        if len(self.sets) == 1:
            which = 0
        else:
            number, within = divmod(place, BLOCK)
            block = self._block(number)
            which = int(block[within])
            place = number * self._quota[which] + int((block[:within] == which).sum())
        numbers = self.sets[which]
        epoch, turn = divmod(place, len(numbers))
        return epoch, numbers[int(self._order(which, epoch)[turn])]

    def _order(self, which: int, epoch: int) -> np.ndarray:
        if (which, epoch) not in self._orders:
            own = [which] if which else []
            generator = torch.Generator().manual_seed(stream_seed(*self.seed, "order", epoch, *own))
            self._orders = {key: order for key, order in self._orders.items() if key[0] != which}
            self._orders[which, epoch] = torch.randperm(len(self.sets[which]), generator=generator).numpy()
        return self._orders[which, epoch]

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            generator = torch.Generator().manual_seed(stream_seed(*self.seed, "mixture", number))
            turns = np.repeat(np.arange(len(self.sets)), self._quota)
            self._blocks = {number: turns[torch.randperm(BLOCK, generator=generator).numpy()]}
        return self._blocks[number]


def _quota(weights: Sequence[float]) -> list[int]:
    """How often each set stands in a block: BLOCK shared out by weight, what is left over to the largest remainders, at least once each."""
    exact = np.array(weights, np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact), 1).astype(int)
    for which in np.argsort(-(exact - counts), kind="stable")[: max(0, BLOCK - counts.sum())]:
        counts[which] += 1
    counts[int(np.argmax(counts))] -= counts.sum() - BLOCK
    return counts.tolist()
