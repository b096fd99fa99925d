"""Objectives: what is learned, and how it is scored.

Row objectives belong to a port and judge each of its tokens alone (`corrupt`, then `loss`); the others look across samples or
at whole pictures and belong to a task. One row of a dict per kind.
"""

from stages.parts.config import PartConfig
from stages.parts.objectives.contrastive import ContrastiveConfig
from stages.parts.objectives.denoise import DenoiseConfig
from stages.parts.objectives.masked_denoise import MaskedDenoiseConfig
from stages.parts.objectives.masked_token import MaskedTokenConfig
from stages.parts.objectives.next_feature import NextFeatureConfig
from stages.parts.objectives.next_scale import NextScaleConfig
from stages.parts.objectives.next_token import NextTokenConfig
from stages.parts.objectives.reconstruction import ReconstructionConfig
from stages.parts.objectives.regress import RegressConfig

RowObjective = (
    NextTokenConfig | MaskedTokenConfig | NextScaleConfig | DenoiseConfig | MaskedDenoiseConfig | NextFeatureConfig | RegressConfig
)

ROW_OBJECTIVES: dict[str, type[RowObjective]] = {
    "next-token": NextTokenConfig,
    "masked-token": MaskedTokenConfig,
    "next-scale": NextScaleConfig,
    "denoise": DenoiseConfig,
    "regress": RegressConfig,
    "masked-denoise": MaskedDenoiseConfig,
    "next-feature": NextFeatureConfig,
}

OBJECTIVES: dict[str, type[PartConfig]] = {
    "contrastive": ContrastiveConfig,
    "reconstruction": ReconstructionConfig,
}

__all__ = [
    "OBJECTIVES",
    "ROW_OBJECTIVES",
    "ContrastiveConfig",
    "DenoiseConfig",
    "MaskedDenoiseConfig",
    "MaskedTokenConfig",
    "NextFeatureConfig",
    "NextScaleConfig",
    "NextTokenConfig",
    "ReconstructionConfig",
    "RegressConfig",
    "RowObjective",
]
