"""Samples in a fixed order → packed batches. Which sample comes when is a function of (index, seed, epoch) and of nothing else,
so a resume goes on at any position without replaying what came before."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from stages.data.sample import Sample
from stages.data.shards import Shards
from stages.errors import DataError, GuardError
from stages.recipe import Phase
from stages.sequence.pack import pack
from stages.sequence.plan import MissingField, Planner
from stages.sequence.segment import Batch, Sequence

DEFAULT_BATCH_TOKENS = 32768
IN_MEMORY = 256 * 1024**2  # bytes of decoded fields that are kept, so that an epoch decodes a sample once


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: streams of different names never share random numbers."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


class Stream:
    """Batches of one phase. `position` counts the samples consumed since its start, over epochs; setting it is all a resume needs."""

    def __init__(self, shards: Shards, planner: Planner, phase: Phase, *, seed: int, limit: int | None = None) -> None:
        self.shards, self.planner, self.phase, self.seed = shards, planner, phase, seed
        self.size = min(len(shards), limit or len(shards))
        if not self.size:
            raise DataError("there are no samples to train on")
        self.tasks = feasible_tasks(planner, phase.tasks, shards)
        self.fields = sorted(planner.fields_needed(self.tasks) & set(shards.fields))
        self.position = 0
        self.too_long = 0
        self._memory: dict[int, Sample] = {}
        self._memory_bytes = 0
        self._orders: dict[int, list[int]] = {}

    def next_batch(self) -> Batch:
        """The next samples, planned and packed: `batch_size` samples, or as many as fit `batch_tokens`.

        Raises GuardError where no token of a batch is supervised.
        """
        sequences: list[Sequence] = []
        tokens = 0
        budget = self.phase.batch_tokens or DEFAULT_BATCH_TOKENS
        skipped = 0
        while len(sequences) < self.phase.batch_size if self.phase.batch_size else tokens < budget:
            sequence = self._plan_next()
            if self.phase.batch_size is None and len(sequence) > budget:
                self.too_long, skipped = self.too_long + 1, skipped + 1
                if skipped > self.size:
                    raise DataError(f"every sample is longer than a batch of {budget} tokens")
                continue
            if self.phase.batch_size is None and sequences and tokens + len(sequence) > budget:
                self.position -= 1  # it opens the next batch
                break
            sequences.append(sequence)
            tokens += len(sequence)
        batch = pack(sequences)
        if batch.num_tokens and not batch.num_supervised:
            raise GuardError(
                f"a batch without any supervised token: {', '.join(batch.keys[:4])} …", hint="no segment of its tasks is a target"
            )
        return batch

    def _plan_next(self) -> Sequence:
        epoch, place = divmod(self.position, self.size)
        sample = self._sample(self._order(epoch)[place])
        rng = random.Random(stream_seed(self.seed, self.phase.name, epoch, sample.key))
        self.planner.at_epoch(epoch)
        sequence = self.planner.plan(sample, self._task(rng), rng)
        if self.phase.mix == "every-step":
            weight = self.phase.tasks[sequence.task]
            sequence = reweighted(sequence, weight)
        self.position += 1
        return sequence

    def _task(self, rng: random.Random) -> str:
        names = list(self.tasks)
        if self.phase.mix == "every-step":
            return names[self.position % len(names)]
        return rng.choices(names, weights=[self.tasks[name] for name in names])[0]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, self.phase.name, "order", epoch))
            self._orders = {epoch: torch.randperm(self.size, generator=generator).tolist()}
        return self._orders[epoch]

    def _sample(self, number: int) -> Sample:
        if number in self._memory:
            return self._memory[number]
        sample = self.shards.read(number, fields=self.fields)
        size = sum(getattr(value, "nbytes", 200) for value in sample.fields.values())
        if self._memory_bytes + size <= IN_MEMORY:
            self._memory[number] = sample
            self._memory_bytes += size
        return sample


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
    return [name for name in tasks if name not in feasible_tasks(planner, tasks, shards)]
