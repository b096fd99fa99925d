"""Feature regression at placeholders: learned rows stand where features are to be, and what the network makes of each is compared with
what a frozen encoder says of the picture (SEED-X, arXiv:2404.14396, section 3.1; AlignerNet of Kosmos-G, arXiv:2310.02992)."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from stages.parts.config import PartConfig
from stages.sequence.segment import PortRows


class RegressConfig(PartConfig):
    """distance: l2, the squared error averaged over channels, or cosine, one minus it."""

    kind: Literal["regress"] = "regress"
    samplers: ClassVar[tuple[str, ...]] = ("regress",)
    distance: Literal["l2", "cosine"] = "l2"

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        """The network sees which place each row has in its segment and nothing of the features, in targets and contexts alike."""
        sizes = clean.segment_sizes()
        starts = (sizes.cumsum(0) - sizes).index_select(0, clean.segment)
        numbers = torch.arange(len(clean.segment), device=starts.device) - starts
        return replace(clean, values=numbers, goal=clean.values, read=clean.rows, supervised=clean.target)

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """(n, c) → (n,)."""
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(prediction.float(), goal.float(), dim=1)
        return (prediction.float() - goal.float()).square().mean(dim=1)
