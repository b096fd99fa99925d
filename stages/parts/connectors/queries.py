"""Learned queries: rows that ask a network for what another is to be told (BLIP-2, arXiv:2301.12597; MetaQuery, arXiv:2504.06256)."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class Queries(nn.Module):
    """numbers int64 (n,) of 0..count-1 → (n, out_dim): one learned row each, at the scale at which words start."""

    def __init__(self, count: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_dim))

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, numbers: Tensor, grids: list[tuple[int, ...]] | None = None) -> Tensor:
        return F.embedding(numbers, self.weight)
