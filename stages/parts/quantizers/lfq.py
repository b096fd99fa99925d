"""Lookup-free quantization: a code is the signs of a latent's numbers, one bit each (MAGVIT-v2, arXiv:2310.05737, section 3.1).

There is no codebook to learn. An entropy loss keeps latents away from the boundaries and all codes in use: with p(c | z) the softmax
of 2⟨z, c⟩ / temperature over the codes, it is E H(p) - diversity · H(E p), in nats (eq. 5).
The softmax of all 2^bits codes is never built. Over bits it is a product: bit i is set with probability sigmoid(4 z_i / temperature), so

- E H(p) is the sum of the entropies of the bits, exactly;
- E p is one matrix product of two tables, the probabilities of the first and of the second half of the bits for each latent.

Beyond `joint_bits` even E p has too many entries. Then the bits are cut into groups of at most that many, and the sum of the groups'
entropies takes the place of H(E p): an upper bound, exact where groups are independent. That is the estimate of BSQ (arXiv:2406.07548,
section 3.3), where groups have 9 bits.

Released weights number the bits both ways: Show-o begins with the most significant, Open-MAGVIT2 with the least.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from stages import ranks
from stages.parts.config import Positive, Weight
from stages.parts.quantizers.quantizer import Quantizer, QuantizerConfig, straight_through


class LFQConfig(QuantizerConfig):
    """One bit for each number of a latent (MAGVIT-v2, arXiv:2310.05737). `joint_bits` are estimated together in the entropy loss."""

    kind: Literal["lfq"] = "lfq"
    bits: int = Field(default=18, ge=1, le=62)
    bit_order: Literal["most-significant-first", "least-significant-first"] = "most-significant-first"
    entropy_weight: Weight = 0.1
    diversity: Weight = 1.0  # of H(E p), in units of E H(p)
    temperature: Positive = 0.01
    joint_bits: int = Field(default=18, ge=1, le=20)
    commitment_weight: Weight = 0.25

    @property
    def size(self) -> int:
        return 2**self.bits

    @property
    def dim(self) -> int:
        return self.bits

    def build(self, in_dim: int) -> "LFQ":
        return LFQ(self, in_dim)


class LFQ(Quantizer):
    place_values: Tensor
    step = 1.0  # size of the numbers of a code's vector

    def __init__(self, config: LFQConfig, in_dim: int) -> None:
        super().__init__(config, in_dim)
        self.config = config
        places = torch.arange(config.bits)
        if config.bit_order == "most-significant-first":
            places = places.flip(0)
        self.register_buffer("place_values", 2**places, persistent=False)

    def assign(self, rows: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        bits = rows.detach() > 0
        codes = (bits * self.place_values).sum(1)
        vectors = self.signs(bits)
        self.count(rows, codes)
        losses = {"commitment": self.config.commitment_weight * self.distance(rows, vectors)}
        if self.config.entropy_weight and self.training:
            losses["entropy"] = self.config.entropy_weight * self.entropy(4 * self.step / self.config.temperature * rows)
        return straight_through(vectors, rows), codes, losses

    def vectors(self, codes: Tensor) -> Tensor:
        return self.signs(codes.unsqueeze(1) // self.place_values % 2 == 1)

    def signs(self, bits: Tensor) -> Tensor:
        """(n, bits) whether each bit is set → (n, bits) vectors."""
        return torch.where(bits, self.step, -self.step)

    def distance(self, rows: Tensor, vectors: Tensor) -> Tensor:
        return F.mse_loss(rows, vectors)

    def entropy(self, logits: Tensor) -> Tensor:
        """E H(p) - diversity · H(E p) of (n, bits) log odds of the bits; the mean E p is over the latents of all ranks."""
        everyone = ranks.gathered_rows(logits)
        groups = -(-self.config.bits // self.config.joint_bits)
        shared = torch.stack([entropy_of_mean(group) for group in everyone.tensor_split(groups, dim=1)]).sum()
        return entropy_of_bits(logits) - self.config.diversity * shared


def entropy_of_bits(logits: Tensor) -> Tensor:
    """E H(p), in nats: mean over n of the entropy of independent bits with (n, bits) log odds."""
    odds = -logits.abs()  # a bit and its opposite have one entropy; of the smaller probability nothing cancels
    return (F.softplus(odds) - odds * torch.sigmoid(odds)).sum(1).mean()


def entropy_of_mean(logits: Tensor) -> Tensor:
    """H(E p), in nats: entropy of the mean over n of the joint distributions of independent bits with (n, bits) log odds."""
    first, second = (joint_probabilities(half) for half in logits.tensor_split(2, dim=1))
    mean = (first.t() @ second).flatten() / len(logits)
    mean = mean.clamp(min=1e-12)  # the gradient of p log p has no bound at zero
    return -(mean * mean.log()).sum()


def joint_probabilities(logits: Tensor) -> Tensor:
    """(n, bits) log odds of independent bits → (n, 2^bits) probabilities of their joint values, the first bit the most significant."""
    joint = logits.new_ones(len(logits), 1)
    for ones, zeros in zip(torch.sigmoid(logits).unbind(1), torch.sigmoid(-logits).unbind(1), strict=True):
        joint = torch.stack([joint * zeros.unsqueeze(1), joint * ones.unsqueeze(1)], dim=2).flatten(1)
    return joint
