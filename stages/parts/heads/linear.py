"""A linear head. For vocabularies that several ports share, only the asked slice of its rows is multiplied."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parts.config import PartConfig
from stages.parts.layers import init_linear
from stages.parts.packed import Packed


class LinearHeadConfig(PartConfig):
    """One matrix. `tied`: it is the port's embedding. `zero`: starts at zero, so that the first prediction is zero."""

    kind: Literal["linear"] = "linear"
    tied: bool = False
    zero: bool = False
    bias: bool = False

    def build(self, in_dim: int, out_dim: int, tied_to: nn.Module | None = None) -> "LinearHead":
        if self.tied and not hasattr(tied_to, "weight"):
            raise ValueError("a tied head needs an embedding of the network's width to be tied to")
        return LinearHead(in_dim, out_dim, bias=self.bias, zero=self.zero, tied_to=tied_to if self.tied else None)


class LinearHead(nn.Module):
    """hidden (n, in_dim) → (n, out_dim), or only columns [start, stop) of it."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, zero: bool, tied_to: nn.Module | None) -> None:
        super().__init__()
        self.out_dim, self.zero = out_dim, zero
        self._tied: tuple[Any, ...] = (tied_to,) if tied_to is not None else ()  # a tuple, so that the embedding is not registered twice
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self._packed: dict[tuple[int, int], Packed] | None = None

    def init_weights(self, generator: torch.Generator) -> None:
        if not self._tied:
            init_linear(self, generator, zero=self.zero)
        elif self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.out_dim if stop is None else stop
        table = self._tied[0].weight if self._tied else self.weight
        weight, bias = table[start:stop], None if self.bias is None else self.bias[start:stop]
        if self._packed is None:
            return F.linear(hidden, weight, bias)
        if (start, stop) not in self._packed:
            self._packed[start, stop] = Packed(weight, bias)
        return self._packed[start, stop](hidden)

    def pack(self) -> None:
        """From now on every slice that is asked for multiplies by a packed copy of the weights there are now."""
        self._packed = {}
