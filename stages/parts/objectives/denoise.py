"""Denoising: DDPM, v-prediction and rectified flow as one objective with four choices.

noisy = alpha(t) · clean + sigma(t) · noise with t in [0, 1], 0 clean. They differ in the schedule, in what is predicted, in how
t is drawn and in how losses are weighted; each choice is a named pure function.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from stages.parts.config import PartConfig, Positive
from stages.parts.prediction import target
from stages.parts.schedules import NOISE_SCHEDULES, draw_timesteps
from stages.sequence.segment import PortRows


class NoisingConfig(PartConfig):
    """schedule: alpha, sigma. predict: noise (DDPM, arXiv:2006.11239), velocity (rectified flow, arXiv:2209.03003) or clean.
    timesteps: how t is drawn; timestep_shift warps it towards noise (SD3, arXiv:2403.03206, eq. 23)."""

    schedule: Literal["linear", "cosine", "ddpm-linear", "scaled-linear"] = "linear"
    predict: Literal["noise", "velocity", "clean"] = "velocity"
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    timestep_shift: Positive = 1.0

    def loss(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """Squared error, mean over channels: (n, c) → (n,)."""
        return (prediction.float() - goal.float()).square().mean(dim=1)


class DenoiseConfig(NoisingConfig):
    """Each target segment is noised as a whole, and denoised by the whole network."""

    kind: Literal["denoise"] = "denoise"
    samplers: ClassVar[tuple[str, ...]] = ("euler", "ddim", "heun")

    def corrupt(self, clean: PortRows, generator: Generator) -> PortRows:
        """One t for each target segment; context segments stay clean at t = 0."""
        drawn = draw_timesteps(self.timesteps, len(clean.grids), generator, shift=self.timestep_shift).to(clean.values.device)
        low, high = clean.timestep_range.unbind(1)
        t = (low + (high - low) * drawn).index_select(0, clean.segment)
        t = torch.where(clean.target, t, torch.zeros_like(t))
        level = NOISE_SCHEDULES[self.schedule].level(t.unsqueeze(1))
        noise = torch.randn(clean.values.shape, generator=generator).to(clean.values)
        noisy = torch.where(clean.target.unsqueeze(1), level.alpha * clean.values + level.sigma * noise, clean.values)
        goal = target(self.predict, clean.values, noise, level)
        return replace(clean, values=noisy, goal=goal, read=clean.rows, supervised=clean.target, timestep=t)
