"""Backbones: the big networks. One row of the dict per kind."""

from stages.parts.backbones.moe import Load, MoE, MoEConfig, balance
from stages.parts.backbones.transformer import Arrangement, KeyValueCache, Transformer, TransformerConfig

BackboneConfig = TransformerConfig

BACKBONES: dict[str, type[TransformerConfig]] = {"transformer": TransformerConfig}

__all__ = [
    "BACKBONES",
    "Arrangement",
    "BackboneConfig",
    "KeyValueCache",
    "Load",
    "MoE",
    "MoEConfig",
    "Transformer",
    "TransformerConfig",
    "balance",
]
