"""A transformer between two networks: every row of a segment sees the whole of it (MetaQuery, arXiv:2504.06256, section 3; the context
refiner of OmniGen2, arXiv:2506.18871)."""

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from stages.parts.backbones.transformer import Transformer, TransformerConfig
from stages.parts.config import Count, PartConfig, Positive, Ratio
from stages.parts.connectors.linear import Projection
from stages.parts.layers import RMSNorm
from stages.sequence.segment import Layout


class TransformerConnectorConfig(PartConfig):
    """`depth` blocks at the width of what comes in, then to the width of where it goes: one matrix, or, with `projection = "mlp"`, two
    with GELU between them. projection = "before": a norm and the matrix first, the blocks at the width of where it goes. out_rms: the root mean square at which rows leave, the gain of a last norm (MetaQuery: the root of 5.5)."""

    kind: Literal["transformer"] = "transformer"
    depth: Count
    heads: Count
    kv_heads: Count | None = None
    mlp_ratio: Ratio = 4.0
    qk_norm: bool = False
    projection: Literal["linear", "mlp", "before"] = "linear"
    out_rms: Positive | None = None

    def build(self, in_dim: int, out_dim: int) -> "TransformerConnector":
        return TransformerConnector(self, in_dim, out_dim)


class TransformerConnector(nn.Module):
    """values (n, in_dim) of segments of these grids → (n, out_dim)."""

    def __init__(self, config: TransformerConnectorConfig, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.before = Projection([in_dim, out_dim], norm=True) if config.projection == "before" else None
        inner_dim = out_dim if self.before is not None else in_dim
        blocks = TransformerConfig(
            width=inner_dim,
            depth=config.depth,
            heads=config.heads,
            kv_heads=config.kv_heads,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
        )
        self.blocks = Transformer(blocks)
        depth = {"linear": 1, "mlp": 2, "before": 0}[config.projection]
        self.after = Projection([in_dim] + [out_dim] * depth) if depth else None
        self.norm = RMSNorm(out_dim) if config.out_rms is not None else None
        self.out_rms = config.out_rms

    def init_weights(self, generator: Generator) -> None:
        self.blocks.init_weights(generator)
        for projection in (self.before, self.after):
            if projection is not None:
                projection.init_weights(generator)
        if self.norm is not None and self.out_rms is not None:
            nn.init.constant_(self.norm.weight, self.out_rms)

    def forward(self, values: Tensor, grids: list[tuple[int, ...]]) -> Tensor:
        rows, places, layout = laid_out(tuple(math.prod(grid) for grid in grids), values.device)
        values = values if self.before is None else self.before(values)
        table = values.new_zeros(rows * layout.shape[1], values.shape[1]).index_copy(0, places, values)
        hidden = self.blocks(table.reshape(rows, layout.shape[1], -1), layout).flatten(0, 1).index_select(0, places)
        hidden = hidden if self.after is None else self.after(hidden)
        return hidden if self.norm is None else self.norm(hidden)


def laid_out(sizes: tuple[int, ...], device: torch.device) -> tuple[int, Tensor, Layout]:
    """Segments of these sizes, one a row: how many rows, the flat place of each of their tokens, and a layout in which each sees itself whole."""
    length = max(sizes, default=0)
    counts = torch.tensor(sizes, device=device)
    within = torch.arange(length, device=device).expand(len(sizes), length)
    real = within < counts[:, None]
    number = torch.arange(len(sizes), device=device)[:, None].expand_as(real)
    nothing = torch.zeros_like(within)
    layout = Layout(
        sample_id=torch.where(real, number, -1),
        block_id=torch.where(real, nothing, -1),
        index=within,
        full=real,
        isolated=torch.zeros_like(real),
        positions=within[:, :, None].expand(-1, -1, 3),
        expert_id=nothing,
    )
    return len(sizes), real.reshape(-1).nonzero().squeeze(1), layout
