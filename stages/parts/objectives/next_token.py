"""Next-token prediction: the row before a token is read to predict it."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from stages.parts.config import PartConfig, Weight
from stages.sequence.segment import PortRows


class NextTokenConfig(PartConfig):
    """Shifted cross-entropy. `softmax`: over the port's own ids, or over all ids that share its vocabulary (Chameleon's one
    softmax). `z_loss` · log²Z keeps logits from drifting (Chameleon, arXiv:2405.09818, 1e-5)."""

    kind: Literal["next-token"] = "next-token"
    samplers: ClassVar[tuple[str, ...]] = ("autoregressive",)
    softmax: Literal["port", "vocabulary"] = "port"
    z_loss: Weight = 0.0

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        """Nothing is hidden; targets that have a row before them in their sample are read there."""
        return replace(clean, goal=clean.values, read=clean.previous, supervised=clean.target & (clean.previous >= 0))

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """Cross-entropy (n,) of logits (n, v) with ids (n,), in nats."""
        return cross_entropy(prediction, goal, self.z_loss)


def cross_entropy(logits: Tensor, ids: Tensor, z_loss: float = 0.0) -> Tensor:
    """-log softmax(logits)[id] (n,), plus z_loss · logsumexp²."""
    losses = F.cross_entropy(logits.float(), ids, reduction="none")
    return losses + z_loss * torch.logsumexp(logits.float(), dim=1).square() if z_loss else losses
