"""Parallel decoding of masked codes (MaskGIT, arXiv:2202.04200, section 3.2).

All codes start hidden. In every round the network predicts them all, an id is drawn for each hidden code, and the most confident draws
are kept; the mask schedule says how many stay hidden. Confidence is the log-probability of the drawn id plus Gumbel noise that fades over
the rounds. A code once shown is never changed, and the last round shows the rest.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import field_validator
from torch import Generator, Tensor

from stages.errors import nearest
from stages.parts.config import Rounds, Temperature
from stages.parts.samplers.guidance import SamplerConfig
from stages.parts.samplers.logits import sample_logits
from stages.parts.samplers.noise import sample_uniforms
from stages.parts.schedules import MASK_SCHEDULES, hidden_counts

Annealing = Literal["linear", "cumulative"]
PredictLogits = Callable[[Tensor, Tensor], Tensor]


class MaskedConfig(SamplerConfig):
    """`temperature` draws the ids; `choice_temperature` scales the noise in the choice of what to keep, fading by `annealing`.

    `linear`: 1 - i/T after round i of T (MaskGIT). `cumulative`: the product of all those factors so far, as Show-o's code does
    (arXiv:2408.12528), which fades much sooner.
    """

    kind: Literal["masked"] = "masked"
    num_steps: Rounds = 12
    mask_schedule: str = "cosine"
    temperature: Temperature = 1.0
    choice_temperature: Temperature = 1.0
    annealing: Annealing = "linear"

    @field_validator("mask_schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        if name not in MASK_SCHEDULES:
            raise ValueError(f"there is no mask schedule '{name}', {nearest(name, MASK_SCHEDULES)}")
        return name

    def sample(
        self, predict_logits: PredictLogits, num_tokens: int, generators: Sequence[Generator], *, device: torch.device | None = None
    ) -> Tensor:
        """Codes int64 (b, num_tokens), b the number of generators."""
        return masked_decode(
            predict_logits,
            num_tokens,
            generators,
            num_steps=self.num_steps,
            schedule=self.mask_schedule,
            temperature=self.temperature,
            choice_temperature=self.choice_temperature,
            annealing=self.annealing,
            device=device,
        )


def annealing_factors(annealing: Annealing, num_steps: int) -> list[float]:
    """What the choice temperature is multiplied by in each of `num_steps` rounds; 0 in the last."""
    factors = [1.0 - step / num_steps for step in range(1, num_steps + 1)]
    if annealing == "cumulative":
        for step in range(1, num_steps):
            factors[step] *= factors[step - 1]
    return factors


def masked_decode(
    predict_logits: PredictLogits,
    num_tokens: int,
    generators: Sequence[Generator],
    *,
    num_steps: int,
    schedule: str = "cosine",
    temperature: float = 1.0,
    choice_temperature: float = 1.0,
    annealing: Annealing = "linear",
    device: torch.device | None = None,
) -> Tensor:
    """Codes int64 (b, num_tokens), sample i drawn with generators[i] alone.

    `predict_logits(codes (b, n), hidden (b, n))` gives logits (b, n, v), already guided; where `hidden` is True the code is 0 and means
    nothing. A round that shows nothing, because there are more rounds than codes, costs no prediction.
    """
    codes = torch.zeros(len(generators), num_tokens, dtype=torch.int64, device=device)
    hidden = torch.ones_like(codes, dtype=torch.bool)
    left = num_tokens
    for factor, remaining in zip(annealing_factors(annealing, num_steps), hidden_counts(schedule, num_steps, num_tokens), strict=True):
        if remaining == left:
            continue
        logits = predict_logits(codes, hidden).float()
        uniforms = sample_uniforms(generators, (2, num_tokens), device=device)
        drawn = sample_logits(logits.flatten(0, 1), uniforms[:, 0].flatten(), temperature=temperature).view_as(codes)
        gumbel = -torch.log(-torch.log(uniforms[:, 1].clamp(min=1e-20)))
        confidence = logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1) + choice_temperature * factor * gumbel
        least_confident = confidence.masked_fill(~hidden, torch.inf).argsort(dim=1, stable=True)[:, :remaining]
        still_hidden = torch.zeros_like(hidden).scatter(1, least_confident, True)
        codes = torch.where(hidden & ~still_hidden, drawn, codes)
        hidden, left = still_hidden, remaining
    return codes
