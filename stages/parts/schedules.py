"""Functions of the noise level and of decoding progress: how much signal and noise, which t to train on, how many codes to hide.

One convention everywhere: t in [0, 1], 0 = clean, 1 = noise, and noisy = alpha · clean + sigma · noise. A noise schedule is one of two
paths from clean to noise, and a pace along it. On the *line* alpha + sigma = 1 (rectified flow, arXiv:2209.03003); on the *circle* the
squares of alpha and sigma add up to 1 (variance preserving, arXiv:2006.11239). Published VP schedules are tables of T steps: here entry i
of such a table is t = (i + 1) / T, t = 0 is clean, and log alpha is linear in between, so that one function serves training at any t and
samplers on any grid. Coefficients are computed in float64 and returned in the dtype of t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]


class NoiseLevel(NamedTuple):
    """A point of a path. `place` measures the way along it: t on the line, the angle atan2(sigma, alpha) on the circle.

    `alpha_rate` and `sigma_rate` are the derivatives of alpha and sigma by `place`, hence velocity = alpha_rate · clean + sigma_rate ·
    noise. On both paths alpha · sigma_rate - sigma · alpha_rate = 1: clean and noise follow from noisy and velocity without a division.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor
    place: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """A path and a pace. `schedule(t)` is (alpha, sigma), elementwise; `schedule.level(t)` adds what velocities need."""

    path: Literal["line", "circle"]
    coefficients: Coefficients

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the shape and dtype of t, which lies in [0, 1]."""
        alpha, sigma = self.coefficients(t.double())
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def level(self, t: Tensor) -> NoiseLevel:
        """The level at t, elementwise: give t the shape that broadcasts against the data, for rows (n, c) that is (n, 1)."""
        alpha, sigma = self(t)
        if self.path == "line":
            return NoiseLevel(alpha, sigma, -torch.ones_like(alpha), torch.ones_like(alpha), sigma)
        return NoiseLevel(alpha, sigma, -sigma, alpha, torch.atan2(sigma, alpha))


def _line(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1.0 - t, t


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = cos(π/2 · (t + 0.008) / 1.008), scaled to 1 at t = 0 (arXiv:2102.09672, eq. 17).

    The paper caps beta at 0.999, which in its table of 1000 steps changes the last entry only. The same floor holds here: alpha ends at
    4.9e-5 instead of 0, equal to the table everywhere, and a clean estimate from predicted noise stays finite.
    """
    offset = 0.008

    def cosine(u: float) -> float:
        return math.cos((u + offset) / (1 + offset) * math.pi / 2) / math.cos(offset / (1 + offset) * math.pi / 2)

    alpha = torch.cos((t + offset) / (1 + offset) * (math.pi / 2)) / math.cos(offset / (1 + offset) * math.pi / 2)
    alpha = alpha.clamp(min=math.sqrt(1 - 0.999) * cosine(0.999), max=1.0)
    return alpha, (1.0 - alpha * alpha).sqrt()


@cache
def _log_alpha_table(betas: Literal["ddpm-linear", "scaled-linear"]) -> Tensor:
    """log alpha at t = 0, 1/T, ..., 1 (T + 1 values, T = 1000), from the betas of the published table."""
    if betas == "ddpm-linear":
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    else:
        beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0) / 2])


def _from_table(betas: Literal["ddpm-linear", "scaled-linear"]) -> Coefficients:
    def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
        table = _log_alpha_table(betas).to(t.device)
        steps = len(table) - 1
        entry = (t * steps).floor().clamp(0, steps - 1).long()
        below, above = table.take(entry), table.take(entry + 1)
        log_alpha = below + (above - below) * (t * steps - entry)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    return coefficients


# kind → schedule. "ddpm-linear": beta from 1e-4 to 0.02 (DDPM, arXiv:2006.11239; DiT). "scaled-linear": sqrt(beta) linear, beta from
# 0.00085 to 0.012 (Stable Diffusion, arXiv:2112.10752); it ends at alpha = 0.068, so that a start from pure noise is slightly biased, as
# published.
NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule("line", _line),
    "cosine": NoiseSchedule("circle", _cosine),
    "ddpm-linear": NoiseSchedule("circle", _from_table("ddpm-linear")),
    "scaled-linear": NoiseSchedule("circle", _from_table("scaled-linear")),
}


def shift_timestep(t: Tensor, shift: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t), which fixes 0 and 1 (SD3, arXiv:2403.03206, section 5.3.2).

    On the linear path it moves log SNR by -2 ln k at every t. FLUX's mu is the same map with k = e^mu.
    """
    return shift * t / ((1 - t) + shift * t)  # written so that 1 stays 1 in floating point


def _uniform(count: int, generator: Generator) -> Tensor:
    return 1.0 - torch.rand(count, generator=generator, dtype=torch.float64)  # (0, 1]: every row carries some noise to remove


def _logit_normal(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float64).sigmoid()


# kind → draw: (count, generator) → float64 (count,) in (0, 1]. "logit-normal" has location 0 and scale 1 (SD3, arXiv:2403.03206, eq. 19).
TIMESTEP_DISTRIBUTIONS: dict[str, Callable[[int, Generator], Tensor]] = {"uniform": _uniform, "logit-normal": _logit_normal}


def draw_timesteps(distribution: str, count: int, generator: Generator, *, shift: float = 1.0) -> Tensor:
    """`count` noise levels to train on, float32 (count,) in (0, 1]: drawn by a row of TIMESTEP_DISTRIBUTIONS, then shifted."""
    return shift_timestep(TIMESTEP_DISTRIBUTIONS[distribution](count, generator), shift).float()


def timestep_grid(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """The num_steps + 1 times a sampler visits, float64, from 1 down to 0: evenly spaced, then shifted.

    For a table of T steps this is "trailing" spacing (arXiv:2305.08891, table 2): it starts at the last entry and stays on entries if
    num_steps divides T.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    return shift_timestep(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift)


# kind → the fraction of codes still hidden at progress u: 1 at u = 0, 0 at u = 1 (MaskGIT, arXiv:2202.04200, section 3.3).
MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda u: math.cos(math.pi / 2 * u),
    "linear": lambda u: 1.0 - u,
    "square": lambda u: 1.0 - u * u,
}


def num_hidden(schedule: str, progress: float, num_tokens: int) -> int:
    """How many of `num_tokens` codes training hides when `progress` (uniform in [0, 1)) was drawn: rounded, at least one."""
    return max(1, round(MASK_SCHEDULES[schedule](progress) * num_tokens))


def hidden_counts(schedule: str, num_steps: int, num_tokens: int) -> list[int]:
    """How many codes are still hidden after each of `num_steps` decoding rounds: it falls in every round until one is left, and ends at 0.

    max(1, min(hidden - 1, ⌊num_tokens · ratio⌋)), and the last round takes the rest (MaskGIT's decoding, arXiv:2202.04200, section 3.2).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    counts = [num_tokens]
    for step in range(1, num_steps):
        counts.append(max(1, min(counts[-1] - 1, math.floor(num_tokens * MASK_SCHEDULES[schedule](step / num_steps)))))
    return [*counts[1:], 0]
