"""Ranks: the processes that torchrun started to work on one thing together. A process on its own is the one rank of one.

Everything that crosses from rank to rank during training goes through the few functions here; with one rank each of them returns what
it was given. Small numbers travel as CPU tensors, so that no GPU has to wait for them.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages import stop
from stages.errors import UsageError

PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others: the slowest opens foreign shards or reads a large checkpoint
WAIT_SECONDS = 0.002
FOREVER = timedelta(days=30)  # where ranks work by themselves and meet at the end; torchrun ends them all when one fails


@contextmanager
def joined(patience: timedelta = PATIENCE) -> Iterator[None]:
    """Join the ranks that torchrun started, for the time of a stage: gloo between CPUs, NCCL between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no MASTER_ADDR",
            hint="start several ranks with torchrun --nproc-per-node N -m mmgen_cli STAGE ...",
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
        yield  # after an exception the process ends, and with it the group: to leave in good order one would have to wait for the others
        wait()
    except RuntimeError as error:
        if (instead := stop.lost_rank(error)) is not None:
            raise instead from error
        raise
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every rank is here. Signals are heard meanwhile, because it may be long."""
    if size() > 1:
        work = dist.all_reduce(torch.zeros(1), async_op=True)
        while not work.is_completed():
            time.sleep(WAIT_SECONDS)
        work.wait()


def summed(numbers: Tensor) -> Tensor:
    """The sum over the ranks of a tensor each has one of, in place and without a gradient."""
    if size() > 1:
        dist.all_reduce(numbers)
    return numbers


def from_first(numbers: Tensor) -> Tensor:
    """What rank 0 has, on every rank, in place."""
    if size() > 1:
        dist.broadcast(numbers, src=0)
    return numbers


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks. Values are pickled between processes of one run: never give it anything from a file."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gathered_rows(rows: Tensor) -> Tensor:
    """Every rank's rows (n, ...), below each other in the order of ranks; n may differ. The gradient of a row goes to the rank it is from."""
    return _GatherRows.apply(rows) if size() > 1 else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = torch.zeros(size(), dtype=torch.int64)
        counts[rank()] = len(rows)
        ctx.counts = dist_counts = summed(counts).tolist()
        padded = rows.new_zeros(max(dist_counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in dist_counts]
        dist.all_gather(everyone, padded)
        return torch.cat([own[:count] for own, count in zip(everyone, dist_counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = summed(gradients[0].contiguous().clone())
        return total.split(ctx.counts)[rank()]
