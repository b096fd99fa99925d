"""Heads: hidden rows → predictions of one port. One row of the dict per kind."""

from stages.parts.heads.convnext import ConvNeXtHeadConfig
from stages.parts.heads.deep import DeepHeadConfig
from stages.parts.heads.linear import LinearHeadConfig
from stages.parts.heads.mlp import MLPHeadConfig

HeadConfig = LinearHeadConfig | MLPHeadConfig | DeepHeadConfig | ConvNeXtHeadConfig

HEADS: dict[str, type[HeadConfig]] = {
    "linear": LinearHeadConfig,
    "mlp": MLPHeadConfig,
    "deep": DeepHeadConfig,
    "convnext": ConvNeXtHeadConfig,
}

__all__ = ["HEADS", "HeadConfig", "LinearHeadConfig", "MLPHeadConfig"]
