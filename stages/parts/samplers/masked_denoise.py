"""Masked autoregressive sampling of continuous tokens (MAR, arXiv:2406.11838, section 4.3 and appendix).

All tokens start hidden, and every sample has its own random order. In each round the network reads what is there, and the next tokens in
order are drawn by denoising them with the port's head alone: the network runs once a round, however many steps the head takes. The mask
schedule says how many tokens stay hidden. Guidance combines the head's predictions.

Shapes: b samples · n tokens · k tokens of a round · c channels · z whatever the network told of each token, one for each guidance pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from pydantic import field_validator
from torch import Generator, Tensor

from stages.errors import nearest
from stages.parts.config import Fraction, Positive, Rounds, Temperature
from stages.parts.prediction import Prediction
from stages.parts.samplers.denoise import sample_ddim
from stages.parts.samplers.guidance import SamplerConfig
from stages.parts.samplers.noise import sample_normals, sample_uniforms
from stages.parts.schedules import MASK_SCHEDULES, NoiseSchedule, hidden_counts, timestep_grid

Condition = Callable[[Tensor, Tensor], Tensor]


class HeadDenoiser(Protocol):
    """The guided prediction of the head; see `sample_masked_latents`."""

    def __call__(self, noisy: Tensor, t: float, *, z: Tensor, share: float) -> Tensor: ...


class MaskedDenoiseSamplerConfig(SamplerConfig):
    """`num_steps` rounds of the network, in each `head_steps` of the head. `eta` as in ddim: 1 is ancestral, as MAR samples.

    temperature: multiplies the fresh noise of the head's steps (MAR), or with eta = 0, where there is none, the noise it starts from.
    guidance_schedule: `linear` lets guidance grow with the share of tokens shown after the round (MAR), `constant` does not.
    clip: clean estimates are kept in [-clip, clip].
    """

    kind: Literal["masked-denoise"] = "masked-denoise"
    num_steps: Rounds = 64
    mask_schedule: str = "cosine"
    head_steps: Rounds = 100
    eta: Fraction = 1.0
    temperature: Temperature = 1.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    timestep_shift: Positive | None = None
    clip: Positive | None = None

    @field_validator("mask_schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        if name not in MASK_SCHEDULES:
            raise ValueError(f"there is no mask schedule '{name}', {nearest(name, MASK_SCHEDULES)}")
        return name


def sample_masked_latents(
    config: MaskedDenoiseSamplerConfig,
    condition: Condition,
    denoise: HeadDenoiser,
    shape: tuple[int, int],
    schedule: NoiseSchedule,
    predict: Prediction,
    generators: Sequence[Generator],
    *,
    like: Tensor,
    timestep_shift: float = 1.0,
) -> Tensor:
    """Latents (b, n, c) for shape (n, c), sample i drawn with generators[i] alone, on the device and in the dtype of `like`.

    `condition(latents (b, n, c), hidden bool (b, n))` gives z (passes, b, n, w); hidden latents are 0 and mean nothing. `denoise(noisy
    (b, k, c), t, z (passes, b, k, w), share)` is the guided prediction, with `share` of the guidance: 1 is all of it, 0 the condition.
    """
    n, channels = shape
    order = sample_uniforms(generators, (n,), device=like.device).argsort(dim=1)  # the last are shown first
    latents = like.new_zeros(len(generators), n, channels)
    hidden = torch.ones(len(generators), n, dtype=torch.bool, device=like.device)
    times = timestep_grid(config.head_steps, shift=timestep_shift if config.timestep_shift is None else config.timestep_shift)
    left = n
    for remaining in hidden_counts(config.mask_schedule, config.num_steps, n):
        if remaining == left:
            continue
        chosen = order[:, remaining:left]
        z = condition(latents, hidden)
        own = z.gather(2, chosen[None, :, :, None].expand(len(z), -1, -1, z.shape[3]))
        share = 1.0 if config.guidance_schedule == "constant" else (n - remaining) / n
        noise = sample_normals(generators, (left - remaining, channels), like=like)
        drawn = sample_ddim(
            partial(denoise, z=own, share=share),
            noise if config.eta else config.temperature * noise,
            times,
            schedule,
            predict,
            eta=config.eta,
            generators=generators,
            clip=config.clip,
            temperature=config.temperature,
        )
        latents = latents.scatter(1, chosen.unsqueeze(2).expand(-1, -1, channels), drawn)
        hidden = hidden.scatter(1, chosen, False)
        left = remaining
    return latents
