"""One id from each row of logits: temperature, top-k, top-p, then one uniform number per row.

Sampling inverts the cumulative distribution at a given uniform number, so that all the randomness of a row is one number, and a sample
draws the same ids whatever batch it is in. The order is the usual one: temperature first, then top-k, then top-p (arXiv:1904.09751).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stages.parts.config import Entries, Length, Temperature
from stages.parts.samplers.guidance import SamplerConfig

COLDEST = 1e-6  # below it only the likeliest id can be drawn, and a division by it may overflow


class AutoregressiveConfig(SamplerConfig):
    """One token after another. `temperature = 0` takes the likeliest; `max_tokens` ends a segment that has no end of its own."""

    kind: Literal["autoregressive"] = "autoregressive"
    temperature: Temperature = 1.0
    top_k: Entries | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: Length = 256

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The next ids (b,) from logits (b, v) and uniforms (b,) in [0, 1)."""
        return sample_logits(logits, uniforms, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., v) with all but the k largest of each row at -inf; equals of the k-th stay."""
    smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits (..., v) with -inf outside the smallest set of likeliest ids whose probability reaches `top_p`; never empty."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what likelier ids hold together
    dropped = before >= top_p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def sample_logits(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Ids (b,) from logits (b, v) and uniform numbers (b,) in [0, 1); ids whose logit is -inf are never drawn.

    The same uniform number always picks the same id; at temperature 0, and so near to it that this is the same, it is not used.
    """
    if temperature < COLDEST:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    probabilities = logits.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    # rounding in the running sum can point at an id of probability 0; such a row takes its likeliest id
    possible = probabilities.gather(-1, ids) > 0
    return torch.where(possible, ids, probabilities.argmax(dim=-1, keepdim=True)).squeeze(-1)
