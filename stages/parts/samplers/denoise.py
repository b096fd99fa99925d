"""Samplers for denoisers: from noise at t = 1 to clean data at t = 0.

A denoiser is `denoise(noisy, t)`, which answers with what it `predict`s: noise, velocity or clean data. A sampler turns the answer into
estimates of clean and noise, and moves to the next time:

- *ddim* keeps both estimates and mixes them anew, alpha_s · clean + sigma_s · noise (arXiv:2010.02502, eq. 12); `eta` replaces part of the
  estimated noise by fresh noise, and eta = 1 is ancestral DDPM sampling with the smaller variance.
- *euler* is ddim with eta = 0: on the straight path that step is exactly noisy + (s - t) · velocity, and on any path it is Euler's step
  in the variables noisy / alpha and sigma / alpha, written so that alpha may be 0.
- *heun* averages the velocity at both ends of an euler step: second order, two evaluations a step (arXiv:2206.00364, algorithm 1).

Every row of a batch is at the same t; the coefficients of a step are computed in float64.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Generator, Tensor

from stages.parts.config import Fraction, Positive, Rounds
from stages.parts.prediction import Prediction, clean_to_noise, estimates, velocity
from stages.parts.samplers.guidance import SamplerConfig
from stages.parts.samplers.noise import sample_normals
from stages.parts.schedules import NoiseLevel, NoiseSchedule, timestep_grid

Denoiser = Callable[[Tensor, float], Tensor]


class DenoiseSamplerConfig(SamplerConfig):
    """`timestep_shift`: none is the objective's. `clip`: clean estimates are kept in [-clip, clip], which suits pixels and not latents."""

    num_steps: Rounds = 50
    timestep_shift: Positive | None = None
    clip: Positive | None = None

    def times(self, timestep_shift: float = 1.0) -> Tensor:
        """The grid of times (num_steps + 1,), shifted by the config's own shift or else by the objective's, which is the argument."""
        return timestep_grid(self.num_steps, shift=timestep_shift if self.timestep_shift is None else self.timestep_shift)


class EulerConfig(DenoiseSamplerConfig):
    """First order: what rectified flow models are sampled with (arXiv:2209.03003)."""

    kind: Literal["euler"] = "euler"


class HeunConfig(DenoiseSamplerConfig):
    """Second order, two evaluations a step (arXiv:2206.00364)."""

    kind: Literal["heun"] = "heun"


class DdimConfig(DenoiseSamplerConfig):
    """First order; eta = 0 is deterministic, eta = 1 is ancestral DDPM (arXiv:2010.02502)."""

    kind: Literal["ddim"] = "ddim"
    eta: Fraction = 0.0


def sample_denoised(
    config: DenoiseSamplerConfig,
    denoise: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    predict: Prediction,
    *,
    timestep_shift: float = 1.0,
    generators: Sequence[Generator] = (),
) -> Tensor:
    """Clean data of the shape of `noise` (b, ...), with the sampler that `config` describes; `timestep_shift` is the objective's."""
    times = config.times(timestep_shift)
    if isinstance(config, HeunConfig):
        return sample_heun(denoise, noise, times, schedule, predict, clip=config.clip)
    if isinstance(config, DdimConfig):
        return sample_ddim(denoise, noise, times, schedule, predict, eta=config.eta, generators=generators, clip=config.clip)
    return sample_euler(denoise, noise, times, schedule, predict, clip=config.clip)


def sample_euler(
    denoise: Denoiser, noise: Tensor, times: Tensor, schedule: NoiseSchedule, predict: Prediction, *, clip: float | None = None
) -> Tensor:
    """First-order sampling from `noise` (b, ...) at times[0] down to times[-1]; one evaluation for each of len(times) - 1 steps."""
    return sample_ddim(denoise, noise, times, schedule, predict, clip=clip)


def sample_ddim(
    denoise: Denoiser,
    noise: Tensor,
    times: Tensor,
    schedule: NoiseSchedule,
    predict: Prediction,
    *,
    eta: float = 0.0,
    generators: Sequence[Generator] = (),
    clip: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Sampling from `noise` (b, ...) at times[0] down to times[-1]; with eta > 0 row i takes its fresh noise from generators[i], times
    `temperature`."""
    if eta > 0 and len(generators) != len(noise):
        raise ValueError(f"eta = {eta} needs one generator for each of {len(noise)} samples, found {len(generators)}")
    noisy = noise
    for t, s in pairwise(times.tolist()):
        level, after = _level(schedule, t), _level(schedule, s)
        clean, estimated = _estimates(predict, denoise(noisy, t), noisy, level, clip)
        fresh = temperature * sample_normals(generators, noise.shape[1:], like=noise) if eta > 0 and after.sigma > 0 else None
        noisy = ddim_step(clean, estimated, level, after, eta=eta, fresh=fresh)
    return noisy


def ddim_step(
    clean: Tensor, noise: Tensor, level: NoiseLevel, after: NoiseLevel, *, eta: float = 0.0, fresh: Tensor | None = None
) -> Tensor:
    """The step from `level` to the cleaner level `after`, given estimates of clean and noise (arXiv:2010.02502, eq. 12 and 16).

    The posterior of a Gaussian path from t to s has variance sigma_s² / sigma_t² · (sigma_t² - (alpha_t / alpha_s)² sigma_s²); `eta`
    scales its standard deviation. That much of sigma_s is `fresh` noise, the rest is the estimated one.
    """
    if fresh is None:
        return after.alpha * clean + after.sigma * noise
    carried = level.alpha / after.alpha * after.sigma
    fresh_sigma = eta * after.sigma / level.sigma * (level.sigma**2 - carried**2).clamp(min=0.0).sqrt()
    kept_sigma = (after.sigma**2 - fresh_sigma**2).clamp(min=0.0).sqrt()
    return after.alpha * clean + kept_sigma * noise + fresh_sigma * fresh


def sample_heun(
    denoise: Denoiser, noise: Tensor, times: Tensor, schedule: NoiseSchedule, predict: Prediction, *, clip: float | None = None
) -> Tensor:
    """Second-order sampling from `noise` (b, ...) at times[0] down to times[-1]; two evaluations a step.

    A last step to t = 0 has no corrector if clean data are predicted or clipped: there they say nothing about the noise, nor about the
    velocity.
    """
    noisy = noise
    for t, s in pairwise(times.tolist()):
        level, after = _level(schedule, t), _level(schedule, s)
        clean, estimated = _estimates(predict, denoise(noisy, t), noisy, level, clip)
        guess = ddim_step(clean, estimated, level, after)
        if after.sigma == 0 and (predict == "clean" or clip is not None):
            return guess
        slope = velocity(clean, estimated, level)
        slope_after = velocity(*_estimates(predict, denoise(guess, s), guess, after, clip), after)
        noisy = noisy + (after.place - level.place) * (slope + slope_after) / 2
    return noisy


def _level(schedule: NoiseSchedule, t: float) -> NoiseLevel:
    """The level as float64 scalars, which multiply tensors of any dtype and device without changing either."""
    return schedule.level(torch.tensor(t, dtype=torch.float64))


def _estimates(predict: Prediction, prediction: Tensor, noisy: Tensor, level: NoiseLevel, clip: float | None) -> tuple[Tensor, Tensor]:
    clean, noise = estimates(predict, prediction, noisy, level)
    if clip is None:
        return clean, noise
    clean = clean.clamp(-clip, clip)
    return clean, clean_to_noise(clean, noisy, level)  # the noise that goes with the clipped estimate
