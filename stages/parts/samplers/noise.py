"""Randomness that belongs to a sample, not to a batch.

Every sample has its own generator, named by the run's seed, the sample's key and what the numbers are for. All numbers are drawn on the
CPU, one block per sample, and only then moved, so neither the batch a sample is in nor the device changes its noise.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def sample_generator(seed: int, key: str, *stream: str | int) -> Generator:
    """A CPU generator that depends on (seed, key, stream) alone, through sha256.

    PyTorch's CPU engine uses 32 bits of a seed, so two of n generators start equal with probability about n² / 2³³.
    """
    digest = hashlib.sha256(repr((seed, key, *stream)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def sample_normals(generators: Sequence[Generator], shape: Sequence[int], *, like: Tensor | None = None) -> Tensor:
    """Standard normal noise (b, *shape), row i from generators[i]; on the device and in the dtype of `like` (default CPU, float32)."""
    block = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    return block if like is None else block.to(like)


def sample_uniforms(generators: Sequence[Generator], shape: Sequence[int] = (), *, device: torch.device | None = None) -> Tensor:
    """Uniform float32 numbers (b, *shape) in [0, 1), row i from generators[i]."""
    return torch.stack([torch.rand(tuple(shape), generator=generator) for generator in generators]).to(device)
