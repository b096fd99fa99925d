"""Heads: hidden rows → predictions of one port. One row of the dict per kind."""

from stages.parts.heads.linear import LinearHeadConfig

HeadConfig = LinearHeadConfig

HEADS: dict[str, type[LinearHeadConfig]] = {"linear": LinearHeadConfig}

__all__ = ["HEADS", "HeadConfig", "LinearHeadConfig"]
