"""The few layers that several parts share: norms, MLPs, timestep embedding, patchify, initialisation."""

import math
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def init_linear(layer: Any, generator: Generator, *, std: float | None = None, zero: bool = False) -> None:
    """Normal weights of standard deviation 1/sqrt(fan_in), or `std`, or zeros; zero bias."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=1.0 / math.sqrt(layer.weight.shape[1]) if std is None else std, generator=generator)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.dim = nn.Parameter(torch.empty(dim)), eps, dim

    def init_weights(self, generator: Generator) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


class LayerNorm(nn.Module):
    """Mean and variance normalisation over the last axis (arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.dim = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim)), eps, dim

    def init_weights(self, generator: Generator) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """LayerNorm over each head's own channels, (..., heads, dim), with a weight and a bias for every head: how Chameleon norms queries and
    keys (arXiv:2405.09818, section 2.3), where one weight for all heads is the habit elsewhere."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(heads, dim)), nn.Parameter(torch.empty(heads, dim)), eps

    def init_weights(self, generator: Generator) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


NormKind = Literal["rms", "layer"]
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x), gate and up as one matrix (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)

    def init_weights(self, generator: Generator, out_std: float) -> None:
        init_linear(self.gate_up, generator)
        init_linear(self.down, generator, std=out_std / math.sqrt(self.down.in_features))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GeluMLP(nn.Module):
    """down(gelu(up x)), tanh form of GELU as in GPT-2 and Phi."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)

    def init_weights(self, generator: Generator, out_std: float) -> None:
        init_linear(self.up, generator)
        init_linear(self.down, generator, std=out_std / math.sqrt(self.down.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class TimestepEmbedding(nn.Module):
    """Noise level t (n,) in [0, 1] → (n, dim): sinusoids of 1000 t (cos before sin, as DiT), then Linear, SiLU, Linear."""

    frequencies = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * self.frequencies, dim), nn.Linear(dim, dim)

    def init_weights(self, generator: Generator) -> None:
        init_linear(self.inner, generator)
        init_linear(self.outer, generator)

    def forward(self, t: Tensor) -> Tensor:
        rate = torch.exp(-math.log(10000.0) * torch.arange(self.frequencies, device=t.device, dtype=torch.float32) / self.frequencies)
        angle = 1000.0 * t.float()[:, None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves)))


class MaskVector(nn.Module):
    """vectors (n, w), hidden bool (n,) → the same with one learned vector where a token is hidden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def init_weights(self, generator: Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, vectors: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden.unsqueeze(1), self.weight.to(vectors), vectors)


@cache
def sincos_2d(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed 2-D table (h·w, width): half the width for rows, half for columns, each sin beside cos (DiT, arXiv:2212.09748).

    A grid of (depth, h, w) has the table once for each level, a grid of (n,) is one row.
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    h, w = grid[-2:] if len(grid) > 1 else (1, grid[0])
    row, column = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, width - 4 * quarter)).float().repeat(math.prod(grid[:-2]), 1)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(c, h, w) → (h/p · w/p, c·p·p), patches in raster order, channels slowest within a patch."""
    c, h, w = latents.shape
    if h % patch_size or w % patch_size:
        raise ValueError(f"a grid of {h} × {w} does not divide into patches of {patch_size}")
    cells = latents.reshape(c, h // patch_size, patch_size, w // patch_size, patch_size)
    return cells.permute(1, 3, 0, 2, 4).reshape(-1, c * patch_size * patch_size)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify`: (..., h·w, c·p·p) on a grid of h × w patches → (..., c, h·p, w·p)."""
    h, w = grid
    c = tokens.shape[-1] // (patch_size * patch_size)
    cells = tokens.reshape(*tokens.shape[:-2], h, w, c, patch_size, patch_size)
    lead = tuple(range(tokens.dim() - 2))
    d = len(lead)
    return cells.permute(*lead, d + 2, d, d + 3, d + 1, d + 4).reshape(*tokens.shape[:-2], c, h * patch_size, w * patch_size)
