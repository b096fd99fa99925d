"""Heads: hidden rows → predictions of one port. One row of the dict per kind."""

from stages.parts.heads.convnext import ConvNeXtHeadConfig
from stages.parts.heads.deep import DeepHeadConfig
from stages.parts.heads.diffusion import DiffusionHead, DiffusionMLPConfig
from stages.parts.heads.linear import LinearHeadConfig
from stages.parts.heads.mlp import MLPHeadConfig

HeadConfig = LinearHeadConfig | MLPHeadConfig | DeepHeadConfig | ConvNeXtHeadConfig | DiffusionMLPConfig

HEADS: dict[str, type[HeadConfig]] = {
    "linear": LinearHeadConfig,
    "mlp": MLPHeadConfig,
    "deep": DeepHeadConfig,
    "convnext": ConvNeXtHeadConfig,
    "diffusion-mlp": DiffusionMLPConfig,
}

__all__ = ["HEADS", "DiffusionHead", "DiffusionMLPConfig", "HeadConfig", "LinearHeadConfig", "MLPHeadConfig"]
