"""How ranks share the training of one network: each runs its part of every batch, gradients are averaged, every rank moves alike.

`ddp` (torch's DistributedDataParallel) keeps the whole network on each rank. `fsdp` (torch's FSDP2, `fully_shard`) keeps a part of each
weight, its gradient and its optimizer state on each rank, and puts a layer together when it runs: for networks that do not fit one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stages import ranks

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepResult:
    """What one step found: a loss for each named optimizer, numbers for the log, and how much it saw."""

    losses: dict[str, Tensor]
    log: dict[str, float | int | Tensor] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0  # forward and backward, see `stages.flops`
    keys: tuple[str, ...] = ()


class Engine:
    """Runs work on a network in the way its ranks need. Of one rank it calls the work, and that is all.

    Both engines of torch act when the module they wrap is called, so the work goes through `forward` of a wrapper around the network.
    A sharded network can only be called through here.
    """

    def __init__(self, network: nn.Module, parallel: str = "ddp") -> None:
        self.network = network
        self.sharded = ranks.size() > 1 and parallel == "fsdp"
        self._inside = _Inside(network)
        self._run: Callable[[Callable[[], Any]], Any] = self._inside
        if self.sharded:
            for module in getattr(network, "shard_networks", list)():
                module.register_forward_pre_hook(_alike)
                for unit in module.shard_units():
                    fully_shard(unit)
            fully_shard(self._inside)

    def learn(self) -> None:
        """A phase begins: from here on, what requires a gradient now does, and nothing else."""
        if ranks.size() == 1:
            return
        if not self.sharded:
            # ports that a batch lacks have no gradient: DDP must look for them
            self._run = DistributedDataParallel(self._inside, find_unused_parameters=True)
            return
        learns = {name: parameter.requires_grad for name, parameter in self.network.named_parameters()}
        units = [module for module in self._inside.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.unshard()
        for name, parameter in self.network.named_parameters():  # the put-together weights, which keep what they once were told
            parameter.requires_grad_(learns[name])
        for unit in units:
            unit.reshard()

    def __call__(self, work: Callable[[], Result]) -> Result:
        return self._run(work)

    def step(self, work: Callable[[], StepResult], learning: Mapping[str, list[tuple[str, nn.Parameter]]]) -> StepResult:
        """What a step works out, its losses ready for `backward` on every rank."""
        results: list[StepResult] = []

        def losses() -> dict[str, Tensor]:
            results.append(work())
            found = dict(results[0].losses)
            if self.sharded:
                for name, named in learning.items():
                    found[name] = self._for_all(found[name], {address for address, _ in named})
            return found

        if ranks.size() == 1:
            return work()
        ready = self._run(losses)
        return replace(results[0], losses=ready)

    def _for_all(self, loss: Tensor, own: set[str]) -> Tensor:
        """The loss, with a share of nothing in the weights (of ports, encoders) that only other ranks' batches use.

        So a rank takes part in averaging their gradients. What no rank uses must have none: given a gradient of zero, an optimizer would
        still move it by momentum and decay, which one rank (and DDP) does to no weight that a batch lacks.
        """
        there = [p for n, p in self.network.named_parameters() if n in own and not isinstance(p, DTensor)]
        reached = _leaves(loss)
        here = [id(parameter) in reached for parameter in there]
        anywhere = ranks.summed(torch.tensor(here, dtype=torch.int64)).tolist()
        unused = [p for p, mine, count in zip(there, here, anywhere, strict=True) if count and not mine]
        return sum((0.0 * parameter.sum() for parameter in unused), start=loss)

    def backward(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """One loss never leaves gradients in another's parameters. (Of a sharded network, torch knows its own, and there is one loss.)"""
        torch.autograd.backward(loss, inputs=None if self.sharded else parameters)


class _Inside(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def _alike(_: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a network runs in shards: its input requires a gradient on every rank or on none. Torch averages the gradients of a layer
    when that of its input is there, or else at the very end, and ranks must do so in the same order."""
    x = args[0]
    if torch.is_grad_enabled() and ranks.summed(torch.tensor(int(x.requires_grad))):
        x.requires_grad_()


def _leaves(loss: Tensor) -> set[int]:
    """The ids of all tensors without a history that a loss is made of."""
    nodes: set[Any] = set()
    leaves: set[int] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return leaves


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, if it is in shards. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
