"""Next-feature regression: continuous features written one after another, as words are (Emu2, arXiv:2312.13286; VL-GPT, arXiv:2312.09251).

The target of a token is what a frozen encoder says of it; it is read at the row before, and enters, when its turn comes, through the
port's connector. A squared error makes the prediction a mean: given the context, one picture only should be likely.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Generator, Tensor

from stages.parts.config import PartConfig
from stages.sequence.segment import PortRows


class NextFeatureConfig(PartConfig):
    """Shifted regression. distance: `l2` is the squared error and `smooth-l1` Huber's with its corner at 1, both averaged over channels;
    `cosine` is one minus the cosine, which leaves lengths alone."""

    kind: Literal["next-feature"] = "next-feature"
    samplers: ClassVar[tuple[str, ...]] = ("autoregressive",)
    distance: Literal["l2", "smooth-l1", "cosine"] = "l2"

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        """Nothing is hidden; targets that have a row before them in their sample are read there."""
        return replace(clean, goal=clean.values, read=clean.previous, supervised=clean.target & (clean.previous >= 0))

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """(n, d) → (n,). Nothing flows back into the goal."""
        prediction, goal = prediction.float(), goal.detach().float()
        if self.distance == "cosine":
            return 1.0 - F.cosine_similarity(prediction, goal, dim=1)
        error = F.mse_loss if self.distance == "l2" else F.smooth_l1_loss
        return error(prediction, goal, reduction="none").mean(dim=1)
