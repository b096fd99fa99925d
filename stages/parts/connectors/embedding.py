"""A learned vector for each id: how token ids and codes enter a network."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig


class EmbeddingConfig(PartConfig):
    """A table of `rows` vectors; rows are counted from the vocabularies of the ports that share it, never written."""

    kind: Literal["embedding"] = "embedding"

    def build(self, rows: int, out_dim: int) -> "Embedding":
        return Embedding(rows, out_dim)


class Embedding(nn.Module):
    """ids int64 (n,) → (n, out_dim). F.embedding, not `table[ids]`: its backward is the same bits every time."""

    def __init__(self, rows: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, out_dim))

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
