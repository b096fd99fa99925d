"""A learned vector for each id: how token ids and codes enter a network, at its width or narrow and widened by an MLP."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import Count, PartConfig, Size
from stages.parts.connectors.linear import Projection


class EmbeddingConfig(PartConfig):
    """A table of `rows` vectors; rows are counted from the vocabularies of the ports that share it, never written."""

    kind: Literal["embedding"] = "embedding"

    def build(self, rows: int, out_dim: int) -> "Embedding":
        return Embedding(rows, out_dim)


class EmbeddingMLPConfig(PartConfig):
    """A table of vectors as narrow as `dim`, the width of the codebook's own, then `depth` matrices with GELU between them: what carries
    codes into a network that does not share its words' table with them (Janus, arXiv:2410.13848, section 3.1)."""

    kind: Literal["embedding-mlp"] = "embedding-mlp"
    dim: Size = 8
    depth: Count = 2

    def build(self, rows: int, out_dim: int) -> "EmbeddingMLP":
        return EmbeddingMLP(rows, self.dim, out_dim, self.depth)


class Embedding(nn.Module):
    """ids int64 (n,) → (n, out_dim). F.embedding, not `table[ids]`: its backward is the same bits every time."""

    def __init__(self, rows: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, out_dim))

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class EmbeddingMLP(nn.Module):
    """ids int64 (n,) → (n, dim) → (n, out_dim)."""

    def __init__(self, rows: int, dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        self.table = Embedding(rows, dim)
        self.aligner = Projection([dim] + [out_dim] * depth)

    def init_weights(self, generator: Generator) -> None:
        """The table starts at a standard deviation of one over the root of its width, as codes of unit length have."""
        nn.init.normal_(self.table.weight, std=self.table.weight.shape[1] ** -0.5, generator=generator)
        self.aligner.init_weights(generator)

    def forward(self, ids: Tensor) -> Tensor:
        return self.aligner(self.table(ids))
