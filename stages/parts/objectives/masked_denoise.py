"""Masked autoregressive generation of continuous tokens (MAR, arXiv:2406.11838): hide a random share of the latents, and learn the
distribution of each hidden one with a small denoiser that is told the network's row for it.

The network itself sees no noise and no noise level: visible latents are clean, hidden ones are a learned vector. Its row z for a hidden
token conditions the port's diffusion head, which is trained like any denoiser (equation 1 of the paper), several noise levels for one z.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.parts.config import Count
from stages.parts.objectives.denoise import NoisingConfig
from stages.parts.objectives.masked_token import rank_within
from stages.parts.prediction import target
from stages.parts.schedules import MASK_SCHEDULES, NOISE_SCHEDULES, draw_timesteps
from stages.sequence.segment import PortRows

TokenDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


class MaskedDenoiseConfig(NoisingConfig):
    """For each target segment a ratio is drawn, and that share of its n tokens, rounded up and at least one, is hidden at random places.

    mask_ratio: `truncated-normal` around 1 with deviation 0.25, cut off below `mask_ratio_min` and above 1 (MAR, section 5), or one of
    the mask schedules at a uniform place (MaskGIT; `linear` makes the ratio itself uniform). repeats: noise draws for each hidden token.
    """

    kind: Literal["masked-denoise"] = "masked-denoise"
    samplers: ClassVar[tuple[str, ...]] = ("masked-denoise",)
    mask_ratio: Literal["truncated-normal", "cosine", "linear", "square"] = "truncated-normal"
    mask_ratio_min: float = Field(default=0.7, gt=0, lt=1)
    repeats: Count = 4

    def ratio(self, place: float) -> float:
        """The share to hide, where a uniform number in [0, 1) drew `place`."""
        if self.mask_ratio != "truncated-normal":
            return MASK_SCHEDULES[self.mask_ratio](place)
        law = NormalDist(1.0, 0.25)
        low, high = law.cdf(self.mask_ratio_min), law.cdf(1.0)
        return min(1.0, law.inv_cdf(low + place * (high - low)))

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        places = torch.rand(len(clean.grids), generator=generator, dtype=torch.float64).tolist()
        sizes = clean.segment_sizes().tolist()
        counts = [max(1, math.ceil(self.ratio(place) * size)) for place, size in zip(places, sizes, strict=True)]
        quota = torch.tensor(counts, device=clean.rows.device)
        hidden = clean.target & (rank_within(clean.segment, generator) < quota.index_select(0, clean.segment))
        values = clean.values.masked_fill(hidden.unsqueeze(1), 0.0)
        return replace(clean, values=values, goal=clean.values, read=clean.rows, supervised=hidden, hidden=hidden)

    def denoising_loss(self, denoise: TokenDenoiser, clean: Tensor, z: Tensor, generator: Generator) -> Tensor:
        """Loss (k,) of the head `denoise(noisy, t, z)` on hidden tokens clean (k, c), whose rows were z (k, w); mean over `repeats`."""
        k, channels = clean.shape
        t = draw_timesteps(self.timesteps, self.repeats * k, generator, shift=self.timestep_shift).to(clean.device)
        noise = torch.randn(self.repeats * k, channels, generator=generator).to(clean)
        clean, z = clean.repeat(self.repeats, 1), z.repeat(self.repeats, 1)
        level = NOISE_SCHEDULES[self.schedule].level(t.unsqueeze(1))
        prediction = denoise(level.alpha * clean + level.sigma * noise, t, z)
        return self.loss(prediction, target(self.predict, clean, noise, level)).view(self.repeats, k).mean(dim=0)
