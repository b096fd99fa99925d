"""Samples in a fixed order → packed batches. Which sample comes when is a function of (index, seed, epoch) and of nothing else,
so a resume goes on at any position without replaying what came before."""

import random
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from stages import ranks, stop
from stages.ahead import Workers
from stages.data.sample import Sample
from stages.data.shards import Shards
from stages.errors import DataError, GuardError, UsageError
from stages.recipe import Phase
from stages.sequence.pack import pack
from stages.sequence.plan import MissingField, Planner
from stages.sequence.segment import Batch, Role, Sequence
from stages.training.order import Order
from stages.training.seeds import stream_seed

DEFAULT_BATCH_TOKENS = 32768
PREFETCH = 16  # sequences each worker has ready
LOOK_AHEAD = 4  # sequences each rank plans before it tells the others how long they are
IN_MEMORY = 256 * 1024**2  # bytes of decoded fields that are kept, so that an epoch decodes a sample once


@dataclass(frozen=True)
class Planned:
    """One place of the stream as every rank knows it, and the sequence where it is this rank's. `length` -1: the sample is bad."""

    length: int
    targets: int
    sequence: Sequence | None


class Stream:
    """Batches of one phase. `position` counts the samples consumed since its start, over epochs; setting it is all a resume needs.

    Which samples make a batch does not depend on the number of ranks. Of several each plans its share, `position % ranks`, tells the
    others how long its sequences are, and packs what is its own of the batch that all of them then see. With `workers`, that many
    processes read and plan ahead; they change nothing else.
    """

    def __init__(
        self, shards: Shards, planner: Planner, phase: Phase, *, seed: int, limit: int | None = None, shared: bool = False, workers: int = 0
    ) -> None:
        self.shards, self.planner, self.phase, self.seed = shards, planner, phase, seed
        sets = [(numbers[: limit or len(numbers)], weight) for numbers, weight in shards.mixture]
        self.order = Order(sets, seed, phase.name)
        self.size = sum(len(numbers) for numbers, _ in sets)
        self.tasks = feasible_tasks(planner, phase.tasks, shards)
        self.fields = sorted(planner.fields_needed(self.tasks) & set(shards.fields))
        self.rank, self.ranks = (ranks.rank(), ranks.size()) if shared else (0, 1)
        if phase.batch_size is not None and phase.batch_size % self.ranks:
            raise not_shared(phase, self.ranks)
        self.too_long = 0
        self.workers = workers
        self._workers: Workers[tuple[Sequence | None, Any]] | None = None
        self._position = 0
        self._ahead: deque[Planned] = deque()
        self._memory: dict[int, Sample] = {}
        self._memory_bytes = 0

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        self._ahead.clear()
        self._workers = None

    def next_batch(self) -> Batch:
        """The next samples, planned and packed: `batch_size` samples, or as many as fit `batch_tokens`; of several ranks, this one's.

        Raises GuardError where no token of a batch is supervised, and `stop.Asked`, on all ranks, where a stop was asked for meanwhile.
        """
        first = self._position
        own: list[Sequence] = []
        taken = tokens = targets = skipped = 0
        size, budget = self.phase.batch_size, self.phase.batch_tokens or DEFAULT_BATCH_TOKENS
        while taken < size if size else tokens < budget and taken < budget:  # a sample may be empty, and all of them
            if not self._ahead:
                self._look_ahead()
            planned = self._ahead[0]
            if not size and taken and 0 <= planned.length <= budget < tokens + planned.length:
                break  # it opens the next batch
            self._ahead.popleft()
            self._position += 1
            if planned.length < 0 or (not size and planned.length > budget):
                self.too_long, skipped = self.too_long + (planned.length >= 0), skipped + 1
                if skipped > self.size:
                    what = f"longer than a batch of {budget} tokens" if self.too_long else "bad"
                    raise DataError(f"every sample is {what}", hint=str(self.shards.bad[0]) if self.shards.bad else "")
                continue
            taken, tokens, targets = taken + 1, tokens + planned.length, targets + planned.targets
            if planned.sequence is not None:
                own.append(planned.sequence)
        if not size and not tokens:
            raise DataError(
                f"{taken:,} samples in a row have no token, so they fill no batch of {budget:,} tokens",
                hint=f"write phases.{self.phase.name}.batch_size for tasks without a sequence, or look at their fields with `mmgen inspect`",
            )
        batch = pack(own or [self._onlooker(first)])
        if tokens and not targets:
            raise GuardError(
                f"a batch without any supervised token: {', '.join(batch.keys[:4])} …", hint="no segment of its tasks is a target"
            )
        return batch

    def _look_ahead(self) -> None:
        """Plan the next places, each rank its own, and learn from the others how long theirs are, and whether one of them has to stop."""
        first = self._position + len(self._ahead)
        places = range(first, first + (1 if self.ranks == 1 else self.ranks * LOOK_AHEAD))
        plans: dict[int, Sequence | None] = {}
        with suppress(stop.Asked):
            for place in range(first + (self.rank - first) % self.ranks, places.stop, self.ranks):
                stop.poll()
                plans[place] = self._planned(place)
        sizes = torch.zeros(len(places) + 1, 2, dtype=torch.int64)
        for place, sequence in plans.items():
            sizes[place - first] = torch.tensor([len(sequence), sequence.num_targets] if sequence is not None else [-1, 0])
        sizes[-1, 0] = stop.asked() is not None
        if self.ranks > 1:
            ranks.summed(sizes)
        *lengths, (stopping, _) = sizes.tolist()
        if stopping:
            raise stop.Asked
        for place, (length, targets) in zip(places, lengths, strict=True):
            self._ahead.append(Planned(length, targets, plans.get(place)))

    def _planned(self, place: int) -> Sequence | None:
        """What `_plan` gives for the next of this rank's places, from a worker where there are workers."""
        if not self.workers:
            return self._plan(place)
        if self._workers is None:
            places = count(place, self.ranks)
            self._workers = Workers(self._for_parent, places, self.workers, PREFETCH, begin=partial(torch.set_num_threads, 1))
        sequence, left_out = next(self._workers)
        self.shards.note_left_out([left_out])
        return None if sequence is None else with_payloads(sequence, torch.from_numpy)

    def _for_parent(self, place: int) -> tuple[Sequence | None, Any]:
        """What a worker sends: the sequence of a place, and what was left out so far. Payloads travel as arrays, because tensors
        between processes cost a file descriptor each."""
        sequence = self._plan(place)
        made = None if sequence is None else with_payloads(sequence, Tensor.numpy)
        return made, self.shards.left_out

    def _onlooker(self, place: int) -> Sequence:
        """For a rank that has no sample of a batch: the first of all, with nothing to learn from."""
        sequence = next(found for place in range(place, place + self.size) if (found := self._plan(place)) is not None)
        return replace(sequence, segments=tuple(replace(segment, role=Role.CONTEXT) for segment in sequence.segments))

    def _plan(self, place: int) -> Sequence | None:
        """The sequence of one place of the stream, a function of (index, seed, place) alone; None where the sample is bad."""
        epoch, number = self.order.at(place)
        sample = self._sample(number)
        if sample is None:
            return None
        rng = random.Random(stream_seed(self.seed, self.phase.name, epoch, sample.key))
        self.planner.at_epoch(epoch)
        sequence = self.planner.plan(sample, self._task(rng, place), rng)
        if self.phase.mix == "every-step":
            sequence = reweighted(sequence, self.phase.tasks[sequence.task])
        return sequence

    def _task(self, rng: random.Random, place: int) -> str:
        names = list(self.tasks)
        if self.phase.mix == "every-step":
            return names[place % len(names)]
        return rng.choices(names, weights=[self.tasks[name] for name in names])[0]

    def _sample(self, number: int) -> Sample | None:
        if number in self._memory:
            return self._memory[number]
        sample = self.shards.read_or_skip(number, fields=self.fields)
        if sample is None:
            return None
        size = sum(getattr(value, "nbytes", 200) for value in sample.fields.values())
        if self._memory_bytes + size <= IN_MEMORY:
            self._memory[number] = sample
            self._memory_bytes += size
        return sample


def not_shared(phase: Phase, count: int) -> UsageError:
    assert phase.batch_size is not None
    return UsageError(
        f"phases.{phase.name}.batch_size = {phase.batch_size} cannot be shared equally by {count} ranks",
        hint=f"--set phases.{phase.name}.batch_size={-(-phase.batch_size // count) * count}",
    )


def with_payloads(sequence: Sequence, change: Callable[[Any], Any]) -> Sequence:
    """The same sequence, what its segments hold in another form."""
    return replace(sequence, segments=tuple(replace(segment, payload=change(segment.payload)) for segment in sequence.segments))


def reweighted(sequence: Sequence, weight: float) -> Sequence:
    """The same sequence with every token's loss weighted once more."""
    return replace(sequence, segments=tuple(replace(segment, weight=segment.weight * weight) for segment in sequence.segments))


def feasible_tasks(planner: Planner, tasks: Mapping[str, float], shards: Shards) -> dict[str, float]:
    """The tasks whose fields the shards have. Raises MissingField when there are none, naming what is missing from which task."""
    fields = set(shards.fields)
    possible = {name: weight for name, weight in tasks.items() if weight > 0 and planner.can_plan(name, fields)}
    if possible:
        return possible
    lacking = []
    for name in tasks:
        lacking.append(
            f"task '{name}' lacks {', '.join(sorted({f for f in planner.fields_needed([name]) if not f.endswith('.ids')} - fields))}"
        )
    made = [field for field in planner.fields_needed(tasks) if "." in field and field not in fields and not field.endswith(".ids")]
    hint = f"`mmgen tokenize` writes {', '.join(sorted(made))}" if made else ""
    raise MissingField(f"these shards fit no task: {'; '.join(lacking)}; they have {', '.join(sorted(fields))}", hint=hint)


def unused_tasks(planner: Planner, tasks: Mapping[str, float], shards: Shards) -> list[str]:
    return [name for name, weight in tasks.items() if weight > 0 and name not in feasible_tasks(planner, tasks, shards)]
