"""Masked-token prediction (MaskGIT, arXiv:2202.04200; Show-o, arXiv:2408.12528): hide a random share of the codes, predict them in place."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from stages.parts.config import PartConfig
from stages.parts.objectives.next_token import cross_entropy
from stages.parts.schedules import num_hidden
from stages.sequence.segment import PortRows


class MaskedTokenConfig(PartConfig):
    """For each target segment u ~ U(0, 1), max(1, round(mask_ratio(u) · n)) tokens at random places become the mask token, and
    only they are judged (Show-o, section 3.2). `codebook_size` ids come from the port; the mask token is the id after them."""

    kind: Literal["masked-token"] = "masked-token"
    samplers: ClassVar[tuple[str, ...]] = ("masked",)
    mask_ratio: Literal["cosine", "linear", "square"] = "cosine"
    softmax: Literal["port", "vocabulary"] = "port"

    def corrupt(self, clean: PortRows, generator: Generator, mask_id: int) -> PortRows:
        progress = torch.rand(len(clean.grids), generator=generator).tolist()
        sizes = clean.segment_sizes().tolist()
        counts = [num_hidden(self.mask_ratio, u, size) for u, size in zip(progress, sizes, strict=True)]
        quota = torch.tensor(counts, device=clean.rows.device)
        hidden = clean.target & (rank_within(clean.segment, generator) < quota.index_select(0, clean.segment))
        values = torch.where(hidden, torch.full_like(clean.values, mask_id), clean.values)
        return replace(clean, values=values, goal=clean.values, read=clean.rows, supervised=hidden)

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        return cross_entropy(prediction, goal)


def rank_within(segment: Tensor, generator: Generator) -> Tensor:
    """A random permutation of 0..size-1 within each segment, as int64 (n,)."""
    noise = torch.rand(segment.numel(), generator=generator, dtype=torch.float64).to(segment.device)
    order = torch.argsort(segment.double() * 2 + noise)  # by segment, at random inside it
    sizes = torch.bincount(segment)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(segment.numel(), device=segment.device) - starts.index_select(0, segment.index_select(0, order))
    return torch.empty_like(rank).scatter_(0, order, rank)
