"""Exponential moving average of the weights that learn."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class EMA:
    """average ← d · average + (1 - d) · weights, with d = min(decay, (1 + n) / (10 + n)) at update n, so that early averages are not
    stuck at the initial weights. Kept in float32."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: parameter.detach().float().clone() for name, parameter in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.average[name], parameter) for name, parameter in named]
        torch._foreach_lerp_([mine for mine, _ in pairs], [theirs.detach().float() for _, theirs in pairs], 1 - d)
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        return self.average
