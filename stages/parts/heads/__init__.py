"""Heads: hidden rows → predictions of one port. One row of the dict per kind."""

from stages.parts.heads.diffusion import DiffusionHead, DiffusionMLPConfig
from stages.parts.heads.linear import LinearHeadConfig
from stages.parts.heads.mlp import MLPHeadConfig

HeadConfig = LinearHeadConfig | MLPHeadConfig | DiffusionMLPConfig

HEADS: dict[str, type[LinearHeadConfig] | type[MLPHeadConfig] | type[DiffusionMLPConfig]] = {
    "linear": LinearHeadConfig,
    "mlp": MLPHeadConfig,
    "diffusion-mlp": DiffusionMLPConfig,
}

__all__ = ["HEADS", "DiffusionHead", "DiffusionMLPConfig", "HeadConfig", "LinearHeadConfig", "MLPHeadConfig"]
