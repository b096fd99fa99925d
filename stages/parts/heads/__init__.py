"""Heads: hidden rows → predictions of one port. One row of the dict per kind."""

from stages.parts.heads.linear import LinearHeadConfig
from stages.parts.heads.mlp import MLPHeadConfig

HeadConfig = LinearHeadConfig | MLPHeadConfig

HEADS: dict[str, type[LinearHeadConfig] | type[MLPHeadConfig]] = {"linear": LinearHeadConfig, "mlp": MLPHeadConfig}

__all__ = ["HEADS", "HeadConfig", "LinearHeadConfig", "MLPHeadConfig"]
