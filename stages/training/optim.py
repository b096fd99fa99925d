"""Optimizers and learning rates: one AdamW per name (`main`, `discriminator`), groups by learning rate and weight decay."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from stages.model import covers
from stages.recipe import Phase


def learning_rate(phase: Phase, step: int) -> float:
    """Factor on the learning rate at `step` (0-based): linear warm-up, then constant, cosine or linear decay to 0 at `phase.steps`."""
    if step < phase.warmup_steps:
        return (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    if phase.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if phase.lr_schedule == "linear":
        return max(0.0, 1.0 - done)
    return 1.0


def base_rate(phase: Phase, name: str) -> float:
    """The learning rate of one parameter: the longest address of the phase's table that covers it, else `default`."""
    if isinstance(phase.lr, float):
        return phase.lr
    matching = [address for address in phase.lr if address != "default" and covers(address, name)]
    return phase.lr[max(matching, key=len)] if matching else phase.lr["default"]


def build_optimizer(phase: Phase, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW over the parameters that learn; vectors (norms, biases) are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = phase.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((base_rate(phase, name), decay), []).append(parameter)
    tables = [{"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]
    return torch.optim.AdamW(tables, betas=phase.betas, fused=True)
