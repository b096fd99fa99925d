"""Contrastive objectives: two embeddings of one sample should agree, and disagree with those of every other sample of the batch.

`softmax` is CLIP (arXiv:2103.00020, figure 3): for each row of one side, a softmax over the rows of the other. `sigmoid` is SigLIP
(arXiv:2303.15343, algorithm 1): each pair is its own yes-or-no question, with a learned bias that starts at the rarity of a yes.

The negatives are the other rows of the batch as it is given. A batch that holds one caption twice asks the impossible of the softmax
loss: with k equal rows its smallest value for them is ln k, not 0. In a world of few captions draw batches with distinct ones, or read
the loss with that in mind.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.parts.config import PartConfig, Positive, Weight

Normalise = Literal["softmax", "sigmoid"]
MAX_LOGIT_SCALE = 100.0  # CLIP clips its learned scale here, for stability


class ContrastiveConfig(PartConfig):
    """`between`: the addresses whose pooled outputs are compared, of one width. `normalise`: over the batch, or pair by pair.

    `temperature` is where the learned temperature starts; none is the paper's value, 0.07 for softmax and 0.1 for sigmoid.
    """

    kind: Literal["contrastive"] = "contrastive"
    between: tuple[str, str]
    normalise: Normalise = "softmax"
    temperature: Positive | None = None
    weight: Weight = 1.0

    def build(self) -> "Contrastive":
        default = 0.07 if self.normalise == "softmax" else 0.1
        return Contrastive(self.normalise, default if self.temperature is None else self.temperature)


class Contrastive(nn.Module):
    """Embeddings a and b (n, d), row i of both from sample i, of any length → scalar loss. Holds the logarithm of the logit scale."""

    def __init__(self, normalise: Normalise, temperature: float) -> None:
        super().__init__()
        self.normalise, self.temperature = normalise, temperature
        self.log_scale = nn.Parameter(torch.empty(1))  # one element, not zero axes, which could not be sharded
        self.bias = nn.Parameter(torch.empty(1)) if normalise == "sigmoid" else None

    def init_weights(self, generator: Generator) -> None:
        nn.init.constant_(self.log_scale, -math.log(self.temperature))
        if self.bias is not None:
            nn.init.constant_(self.bias, -10.0)

    def similarities(self, a: Tensor, b: Tensor) -> Tensor:
        """Cosines times the learned scale, plus the bias: logits (n, n), rows a, columns b."""
        log_scale: Tensor = self.log_scale
        if self.normalise == "softmax":  # the value stops at the limit, the gradient does not: it can bring the scale back
            log_scale = log_scale - (log_scale - math.log(MAX_LOGIT_SCALE)).clamp(min=0).detach()
        logits = log_scale.exp() * (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T)
        return logits if self.bias is None else logits + self.bias

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(f"contrastive embeddings must have one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
        logits = self.similarities(a, b)
        if self.normalise == "softmax":
            own = torch.arange(len(a), device=a.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        sign = 2 * torch.eye(len(a), device=a.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(sign * logits).sum() / len(a)
